// Giving work to workers, and starting them; see loop.hpp.
#include "loop.hpp"

#include <algorithm>

#include "json.hpp"

namespace fdfast::replio {

namespace {

constexpr double kFirstBackOff_s = 0.05;
constexpr double kLongestBackOff_s = 2;
constexpr double kGrace_s = 1;  // for a process that has closed its stdin or stdout to end by itself

}  // namespace

// Gives what is queued to idle workers, and starts workers for the rest.
bool Loop::dispatch(Time now) {
  Lock lock(ledger_.mutex);
  if (ledger_.stopping()) return false;
  const int news = ledger_.take_news();
  if (ledger_.any_queued()) {
    for (const bool only_held : {true, false}) {
      for (Worker& worker : workers_) {
        if (worker.phase == Phase::serving) feed(worker, only_held, now, lock);
      }
    }
    size_t starting = 0;
    bool unproven = false;
    for (Worker& worker : workers_) {
      starting += worker.phase == Phase::starting;
      unproven |= worker.phase != Phase::vacant && !worker.proven;
    }
    for (Worker& worker : workers_) {
      if (worker.phase != Phase::vacant) continue;
      if (!ledger_.any_queued() || ledger_.queued() <= starting) break;
      // After a failure one start at a time is tried.
      if (failures_ > 0 && (now < not_before_ || unproven)) break;
      Command* command = nullptr;
      if (settings_.ready.empty()) command = ledger_.take([](const Header&) { return true; }, false, now);
      lock.unlock();
      start(worker, command, now);
      lock.lock();
      starting += worker.phase == Phase::starting;
      unproven = true;
    }
  }
  const auto idle = [this](const Worker& worker) {
    return worker.phase == Phase::vacant ||
           (worker.phase == Phase::serving && worker.flights.size() < static_cast<size_t>(settings_.depth));
  };
  ledger_.set_hungry(std::any_of(workers_.begin(), workers_.end(), idle));
  const bool more_to_come = ledger_.any_queued();
  lock.unlock();
  tell(news, more_to_come, now);
  for (Worker& worker : workers_) {
    if (worker.phase == Phase::serving && worker.unflushed) flush(worker, now);
  }
  return true;
}

// Wakes those who wait for any answer. To wake a thread costs more than a small command, so while answers come thick
// and fast, and all workers have more to do, the news is held back for a moment.
void Loop::tell(int news, bool more_to_come, Time now) {
  constexpr double kThick_s = 50e-6;
  constexpr int kMostHeld = 64;
  if (news) {
    const double gap_s = seconds_between(last_news_, now) / news;
    news_gap_s_ += (std::min(gap_s, 1e-3) - news_gap_s_) / 8;
    last_news_ = now;
    if (news_ == 0) news_since_ = now;
    news_ += news;
  }
  if (news_ == 0) return;
  if (more_to_come && news_gap_s_ < kThick_s && news_ < kMostHeld && now < after(news_since_, kHeldNews_s)) return;
  ledger_.notify(std::exchange(news_, 0));
}

// Starts a process, for this command if there is one.
void Loop::start(Worker& worker, Command* command, Time now) {
  try {
    guard_.start();
    worker.child = start_process(launch_);
    guard_.set(worker.index, worker.child.pid);
  } catch (const MachineFault& fault) {
    {
      const Lock held(ledger_.mutex);
      if (command) ledger_.requeue(command);
    }
    start_failed(fault.what(), now);
    return;
  }
  watch(worker, worker.child.out, Stream::out, EPOLLIN);
  watch(worker, worker.child.errors, Stream::errors, EPOLLIN);
  watch(worker, worker.child.pidfd, Stream::end, EPOLLIN);
  worker.watches_out = worker.watches_errors = true;
  worker.phase = settings_.ready.empty() ? Phase::serving : Phase::starting;
  worker.looked = now;
  if (settings_.memory_bytes && !settings_.ready.empty()) worker.next_poll = after(now, settings_.poll_s);
  const Lock held(ledger_.mutex);
  ++ledger_.count.starts;
  ++ledger_.count.workers_alive;
  if (worker.generation > 0 && settings_.mode == Mode::repl) ++ledger_.count.restarts;
  ledger_.worker_pids.push_back(worker.child.pid);
  if (command) {
    board(worker, command, now);
  } else {
    worker.deadline = after(now, settings_.start_timeout_s);
  }
  if (settings_.mode == Mode::once) {
    worker.proven = true;
    failures_ = 0;
  }
}

void Loop::start_failed(const std::string& why, Time now) {
  ++failures_;
  const auto alive = [](const Worker& worker) { return worker.proven; };
  const Lock held(ledger_.mutex);
  ++ledger_.count.failed_starts;
  if (failures_ >= settings_.max_restarts && std::none_of(workers_.begin(), workers_.end(), alive)) {
    Answer answer(End::unavailable);
    answer.payload = std::make_shared<Payload>(Payload{Bytes(), why});
    ledger_.finish_queued(answer, nullptr);
    failures_ = 0;
    return;
  }
  const int doublings = std::min(failures_ - 1, 30);
  not_before_ = after(now, std::min(kFirstBackOff_s * static_cast<double>(1 << doublings), kLongestBackOff_s));
}

// Takes commands up to the depth. `held` shows that the caller holds the ledger's mutex.
void Loop::feed(Worker& worker, bool only_held, Time now, const Lock&) {
  if (worker.retiring || worker.ended || worker.phase != Phase::serving) return;
  while (worker.flights.size() < static_cast<size_t>(settings_.depth)) {
    // A header's environment must be known before a command can be sent into it.
    if (!worker.flights.empty() && worker.flights.back().kind == Flight::Kind::header) return;
    Command* const command =
        ledger_.take([&](const Header& header) { return worker.holds(header); }, only_held, now);
    if (!command) return;
    board(worker, command, now);
  }
}

// Puts a command, or first its header, in flight. `env`: of the command before it in a chain.
void Loop::board(Worker& worker, Command* command, Time now, std::optional<int64_t> env) {
  const Header& header = *command->header;
  if (!env && header.id && worker.holds(header)) env = worker.environments.at(header.id);
  if (!env && header.id) {
    ++ledger_.count.headers;
    launch(worker, Flight::Kind::header, command, header_command(header.text), {});
  } else if (!env) {
    launch(worker, Flight::Kind::command, command, {}, command->text);
  } else {
    Splice splice = splice_environment(command->text, *env);
    launch(worker, Flight::Kind::command, command, std::move(splice.prefix),
           std::string_view(command->text).substr(splice.skip));
  }
  if (worker.flights.size() == 1) set_out(worker, now);
}

void Loop::launch(Worker& worker, Flight::Kind kind, Command* command, std::string prefix, std::string_view body) {
  Flight flight{kind, command, std::move(prefix), body, settings_.mode == Mode::once ? "" : "\n\n"};
  flight.begin = worker.queued_end;
  flight.end = flight.begin + flight.prefix.size() + flight.body.size() + flight.suffix.size();
  worker.queued_end = flight.end;
  worker.flights.push_back(std::move(flight));
  worker.unflushed = true;
}

// The first flight is now what the worker is at, and its time runs.
void Loop::set_out(Worker& worker, Time now) {
  const Flight& flight = worker.flights.front();
  worker.begun = now;
  if (settings_.memory_bytes) worker.next_poll = after(worker.looked, settings_.poll_s);
  worker.late = End::timeout;
  worker.deadline = after(now, flight.kind == Flight::Kind::header ? settings_.start_timeout_s
                                                                    : flight.command->key.timeout_s);
}

// Writes as much as the pipe takes, and sees to the rest.
void Loop::flush(Worker& worker, Time now) {
  worker.unflushed = false;
  const bool broken = !worker.write_flights();
  const bool unfinished = !broken && !worker.wholly_written();
  if (unfinished != worker.watches_input) {
    if (unfinished) watch(worker, worker.child.in, Stream::input, EPOLLOUT);
    else unwatch(worker.child.in);
    worker.watches_input = unfinished;
  }
  if (settings_.mode == Mode::once) {
    if (!unfinished) worker.child.in.close();  // a program need not read all its input
  } else if (broken) {
    worker.retiring = true;
    worker.late = End::crashed;
    worker.deadline = std::min(worker.deadline.value_or(Time::max()), after(now, kGrace_s));
  }
}

}  // namespace fdfast::replio
