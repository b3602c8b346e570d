// Taking answers from workers, and what follows when one ends; see loop.hpp.
#include "loop.hpp"

#include <sys/random.h>

#include <algorithm>
#include <cstring>

#include "json.hpp"

namespace fdfast::replio {

namespace {

constexpr int kReadsInARow = 8;
constexpr size_t kReadBytes = 1 << 20;
constexpr double kGrace_s = 1;        // for a process that has closed its stdout to end by itself
constexpr double kDyingPatience_s = 5;  // for a killed process to be gone
constexpr size_t kOverflowShown = 64 << 10;

// 128 bits that the checked code can't guess.
std::string new_secret() {
  unsigned char bits[16];
  size_t have = 0;
  while (have < sizeof bits) {
    const ssize_t count = getrandom(bits + have, sizeof bits - have, 0);
    if (count > 0) have += static_cast<size_t>(count);
  }
  std::string text;
  for (const unsigned char byte : bits) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace

void Loop::read_out(Worker& worker, Time now) {
  for (int round = 0; round < kReadsInARow; ++round) {
    const auto read = worker.read_out(kReadBytes);
    if (read == Worker::Read::end) {
      unwatch(worker.child.out);
      worker.watches_out = false;
      if (settings_.mode == Mode::repl) {  // it can't answer any more
        worker.retiring = true;
        worker.late = End::crashed;
        worker.deadline = std::min(worker.deadline.value_or(Time::max()), after(now, kGrace_s));
      }
      return;
    }
    cut(worker, now);
    if (worker.phase == Phase::dying) return;
    if (worker.out.view().size() > static_cast<size_t>(settings_.answer_bytes)) {
      kill(worker, End::overflow, now);
      return;
    }
    if (read == Worker::Read::empty) return;
  }
}

// Cuts what was read into frames, and takes them.
void Loop::cut(Worker& worker, Time now) {
  if (settings_.mode == Mode::once) return;
  std::string line;
  while (worker.phase == Phase::starting && worker.out.next_line(line)) {
    if (line != settings_.ready) continue;
    worker.phase = Phase::serving;
    worker.proven = true;
    worker.deadline.reset();
    failures_ = 0;
  }
  Bytes frame;
  while (worker.phase == Phase::serving && !worker.flights.empty() && worker.out.next_frame(frame)) {
    on_frame(worker, std::move(frame), now);
  }
  // Frames that nobody asked for: what comes next from this worker can't be trusted.
  if (worker.phase == Phase::serving && !worker.ended && worker.flights.empty() && worker.out.pending() > 0) {
    {
      const Lock held(ledger_.mutex);
      ++ledger_.count.unsolicited;
    }
    kill(worker, End::crashed, now);
  }
}

void Loop::on_frame(Worker& worker, Bytes frame, Time now) {
  if (frame.size() > static_cast<size_t>(settings_.answer_bytes)) {
    worker.unproven = std::move(frame);
    kill(worker, End::overflow, now);
    return;
  }
  if (worker.written < worker.flights.front().end) {
    // An answer to what has not been asked yet. The command can't have been run.
    worker.why = "it prints frames that nobody asked for: " + std::string(frame.view().substr(0, 200));
    kill(worker, End::crashed, now);
    return;
  }
  if (!worker.unproven) worker.answered = now;
  if (settings_.probe.empty()) {
    accept(worker, std::move(frame), now);
  } else if (!worker.unproven) {
    worker.unproven = std::move(frame);
    send_probe(worker, now);
  } else if (memmem(frame.data(), frame.size(), worker.secret.data(), worker.secret.size())) {
    worker.flights.pop_back();
    Bytes answer = std::move(*worker.unproven);
    worker.unproven.reset();
    accept(worker, std::move(answer), now);
  } else {
    kill(worker, End::forged, now);
  }
}

void Loop::send_probe(Worker& worker, Time now) {
  constexpr double kAtLeast_s = 1;
  worker.secret = new_secret();
  std::string text = settings_.probe;
  for (size_t at = 0; (at = text.find("%s", at)) != std::string::npos; at += worker.secret.size()) {
    text.replace(at, 2, worker.secret);
  }
  launch(worker, Flight::Kind::probe, worker.flights.front().command, std::move(text), {});
  // An answer in the last moment must not fail for the probe's own time.
  worker.deadline = std::max(worker.deadline.value_or(now), after(now, kAtLeast_s));
  flush(worker, now);
}

// Takes the first flight's frame.
void Loop::accept(Worker& worker, Bytes frame, Time now) {
  if (!worker.proven) {
    worker.proven = true;
    failures_ = 0;
  }
  if (worker.flights.front().kind == Flight::Kind::header) accept_header(worker, std::move(frame), now);
  else accept_command(worker, std::move(frame), now);
}

void Loop::accept_header(Worker& worker, Bytes frame, Time now) {
  const auto env = environment_of(frame.view());
  Command* const command = worker.flights.front().command;
  Answer answer;
  if (!env) answer = answer_of(worker, End::header, std::move(frame), now);
  worker.flights.pop_front();
  worker.deadline.reset();
  Lock lock(ledger_.mutex);
  if (env) {
    worker.environments[command->header->id] = *env;
    board(worker, command, now);
  } else {
    // The others that wait for this header would get the same.
    const Header* const header = command->header;
    ledger_.finish(command, answer, worker.begun);
    answer.seconds = 0;
    ledger_.finish_queued(answer, header);
    feed(worker, false, now, lock);
  }
  lock.unlock();
  flush(worker, now);
}

void Loop::accept_command(Worker& worker, Bytes frame, Time now) {
  Command* const command = worker.flights.front().command;
  const auto env = command->then ? environment_of(frame.view()) : std::nullopt;
  Answer answer = answer_of(worker, End::answer, std::move(frame), worker.answered);
  const Time begun = worker.begun;
  worker.flights.pop_front();
  worker.deadline.reset();
  ++worker.served;
  if (is_spent(worker, now)) worker.retiring = true;
  {
    Lock lock(ledger_.mutex);
    Command* const next = env ? ledger_.follow(command) : nullptr;
    ledger_.finish(command, std::move(answer), begun);
    if (!worker.flights.empty()) set_out(worker, now);
    if (next) board(worker, next, now, env);
    if (!worker.flights.empty() || worker.out.pending() == 0) feed(worker, false, now, lock);
    if (worker.retiring && worker.flights.empty()) ++ledger_.count.recycled;
  }
  if (worker.flights.empty()) worker.next_poll.reset();
  if (worker.retiring && worker.flights.empty()) kill(worker, End::crashed, now);
  else if (worker.unflushed) flush(worker, now);
}

// What a worker has said, as the answer to its first flight's command.
Answer Loop::answer_of(Worker& worker, End end, Bytes raw, Time now) const {
  Answer answer(end);
  answer.pid = worker.child.pid;
  answer.seconds = seconds_between(worker.begun, now);
  auto payload = std::make_shared<Payload>();
  payload->raw = std::move(raw);
  const auto tail = static_cast<size_t>(settings_.stderr_bytes);
  if (worker.errors.size() > tail) worker.errors.erase(0, worker.errors.size() - tail);
  payload->errors = std::exchange(worker.errors, {});
  answer.payload = std::move(payload);
  return answer;
}

// Whether the worker must be replaced before its next command.
bool Loop::is_spent(Worker& worker, Time now) {
  if (settings_.recycle_after && worker.served >= settings_.recycle_after) return true;
  if (!settings_.recycle_bytes) return false;
  if (seconds_between(worker.looked, now) >= settings_.poll_s) {
    worker.looked = now;
    worker.resident_bytes = resident_bytes(worker.child.pid, worker.descendants);
  }
  return worker.resident_bytes > settings_.recycle_bytes;
}

// Kills the process with all that it started. Its commands are settled when it is gone.
void Loop::kill(Worker& worker, End verdict, Time now) {
  if (worker.phase == Phase::dying || worker.phase == Phase::vacant) return;
  worker.phase = Phase::dying;
  worker.verdict = verdict;
  worker.deadline = after(now, kDyingPatience_s);
  worker.next_poll.reset();
  worker.child.kill_all(worker.descendants, true);
  for (auto [watched, fd] : {std::pair{&worker.watches_input, &worker.child.in},
                             std::pair{&worker.watches_out, &worker.child.out}}) {
    if (*watched) unwatch(*fd);
    *watched = false;
  }
}

// The process has ended. What it printed before is in the pipes; who else holds them is not waited for.
void Loop::on_end(Worker& worker, Time now) {
  worker.child.kill_all(worker.descendants, false);
  if (worker.watches_errors) worker.read_errors(static_cast<size_t>(settings_.stderr_bytes));
  worker.ended = true;
  for (int64_t left = int64_t{2} << 20; left > 0 && worker.child.out;) {
    const size_t before = worker.out.view().size();
    const auto read = worker.read_out(static_cast<size_t>(left));
    left -= static_cast<int64_t>(worker.out.view().size() - before);
    if (read == Worker::Read::end || worker.out.view().size() == before) break;
  }
  if (worker.phase != Phase::dying) {
    cut(worker, now);  // whole answers count
    const bool too_long = worker.out.view().size() > static_cast<size_t>(settings_.answer_bytes);
    if (worker.phase != Phase::dying) worker.verdict = too_long ? End::overflow : End::crashed;
  }
  guard_.set(worker.index, 0);  // before it is reaped and its number is free
  settle_flights(worker, worker.child.reap(), now);
  vacate(worker);
}

// The worker is gone: its first command ends with the verdict, unless it never read it; others were not begun.
void Loop::settle_flights(Worker& worker, std::optional<int> status, Time now) {
  const uint64_t consumed = worker.consumed();
  const bool dies_by_itself = worker.verdict == End::crashed;
  std::vector<Command*> again;
  bool failed_start = !worker.proven && !settings_.ready.empty();
  Lock lock(ledger_.mutex);
  std::string errors = worker.errors;
  for (size_t i = 0; i < worker.flights.size(); ++i) {
    const Flight& flight = worker.flights[i];
    if (flight.kind == Flight::Kind::probe) continue;
    Command* const command = flight.command;
    const bool unread = consumed <= flight.begin;
    const bool unsent = dies_by_itself && (unread || worker.written < flight.end);
    if (settings_.mode == Mode::repl && !command->follows && (i == 0 ? unsent : unread || !command->unique)) {
      again.push_back(command);
      failed_start |= i == 0 && !worker.proven;
      continue;
    }
    End end = i == 0 ? worker.verdict : End::crashed;
    if (settings_.mode == Mode::once && end == End::crashed && status.value_or(0) >= 0) end = End::answer;
    Bytes raw = worker.unproven ? std::move(*worker.unproven) : worker.out.take_rest();
    if (end == End::overflow && raw.size() > kOverflowShown) raw = Bytes(raw.view().substr(0, kOverflowShown));
    Answer answer = answer_of(worker, end, std::move(raw), now);
    answer.status = status;
    auto& count = ledger_.count;
    count.killed_timeout += end == End::timeout;
    count.killed_memory += end == End::memory;
    count.killed_overflow += end == End::overflow;
    count.forged += end == End::forged;
    count.crashed += end == End::crashed;
    ledger_.finish(command, std::move(answer), worker.begun);
  }
  worker.flights.clear();
  for (auto command = again.rbegin(); command != again.rend(); ++command) ledger_.requeue(*command);
  lock.unlock();
  if (!failed_start) return;
  std::string why = launch_.argv.front() + ": " +
                    (worker.why.empty() ? "the worker ended before it took a command" : worker.why);
  if (status) why += *status < 0 ? ": signal " + std::to_string(-*status) : ": exit status " + std::to_string(*status);
  const auto tail = static_cast<size_t>(settings_.stderr_bytes);
  if (errors.size() > tail) errors.erase(0, errors.size() - tail);
  start_failed(why + (errors.empty() ? "" : "\n" + errors), now);
}

// Makes the place ready for a new process.
void Loop::vacate(Worker& worker) {
  if (worker.watches_input) unwatch(worker.child.in);
  if (worker.watches_out) unwatch(worker.child.out);
  if (worker.watches_errors) unwatch(worker.child.errors);
  if (worker.child.pidfd) unwatch(worker.child.pidfd);
  {
    const Lock held(ledger_.mutex);
    std::erase(ledger_.worker_pids, worker.child.pid);
    --ledger_.count.workers_alive;
  }
  Worker fresh;
  fresh.index = worker.index;
  fresh.generation = worker.generation + 1;
  worker = std::move(fresh);
}

}  // namespace fdfast::replio
