// The I/O thread's waiting; see loop.hpp.
#include "loop.hpp"

#include <poll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace fdfast::replio {

namespace {

constexpr uint64_t kWake = ~uint64_t{0};
constexpr int kMostEvents = 128;
constexpr double kStopPatience_s = 5;

Fd make_epoll() {
  const auto held = hold_forks();
  const int fd = epoll_create1(EPOLL_CLOEXEC);
  if (fd < 0) throw MachineFault(std::string("Pool: epoll: ") + std::strerror(errno) + "; raise `ulimit -n`");
  return Fd(fd);
}

}  // namespace

Loop::Loop(const Settings& settings, Ledger& ledger)
    : settings_(settings),
      ledger_(ledger),
      launch_{settings.argv, settings.env, settings.cwd},
      epoll_(make_epoll()),
      workers_(static_cast<size_t>(settings.workers)) {
  for (size_t i = 0; i < workers_.size(); ++i) workers_[i].index = static_cast<int>(i);
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWake}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, ledger_.wake_fd(), &event);
}

void Loop::run() {
  prctl(PR_SET_NAME, "fdfast-replio");
  epoll_event events[kMostEvents];
  Time now = Clock::now();
  while (true) {
    if (!dispatch(now)) break;
    const int count = epoll_wait(epoll_.get(), events, kMostEvents, wait_ms(now));
    now = Clock::now();
    // What a worker said on stderr before its answer belongs to it, so stderr is read first; the end comes last.
    for (const auto stream : {Stream::errors, Stream::input, Stream::out, Stream::end}) {
      for (int i = 0; i < count; ++i) {
        if (events[i].data.u64 != kWake && static_cast<Stream>(events[i].data.u64 & 3) == stream) {
          handle(events[i], now);
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == kWake) ledger_.clear_wake();
    }
    sweep(now);
  }
  stop();
}

void Loop::watch(const Worker& worker, const Fd& fd, Stream stream, uint32_t events) {
  const uint64_t data = uint64_t{worker.generation} << 32 | static_cast<uint64_t>(worker.index) << 2 |
                        static_cast<uint64_t>(stream);
  epoll_event event{.events = events, .data = {.u64 = data}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event);
}

// Always before a close: a descriptor that a forked process still holds would go on to be reported.
void Loop::unwatch(const Fd& fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd.get(), nullptr); }

void Loop::handle(const epoll_event& event, Time now) {
  Worker& worker = workers_[(event.data.u64 & 0xffffffff) >> 2];
  if (worker.generation != event.data.u64 >> 32 || worker.phase == Phase::vacant) return;
  switch (static_cast<Stream>(event.data.u64 & 3)) {
    case Stream::errors:
      if (worker.watches_errors && !worker.read_errors(static_cast<size_t>(settings_.stderr_bytes))) {
        unwatch(worker.child.errors);
        worker.watches_errors = false;
      }
      break;
    case Stream::input:
      if (worker.watches_input) flush(worker, now);
      break;
    case Stream::out:
      if (worker.watches_out) read_out(worker, now);
      break;
    case Stream::end:
      on_end(worker, now);
      break;
  }
}

int Loop::wait_ms(Time now) {
  Time first = Time::max();
  bool vacant = false;
  for (const Worker& worker : workers_) {
    if (worker.deadline) first = std::min(first, *worker.deadline);
    if (worker.next_poll) first = std::min(first, *worker.next_poll);
    vacant |= worker.phase == Phase::vacant;
  }
  if (vacant && not_before_ > now) first = std::min(first, not_before_);
  if (!undead_.empty()) first = std::min(first, after(now, 1));
  if (first == Time::max()) return -1;
  if (first <= now) return 0;
  return static_cast<int>(std::min<int64_t>(
      std::chrono::ceil<std::chrono::milliseconds>(first - now).count(), 60'000));
}

// Deadlines, memory, and what callers have cancelled.
void Loop::sweep(Time now) {
  std::vector<Worker*> unwanted;
  {
    const Lock held(ledger_.mutex);
    std::erase_if(ledger_.unwanted, [&](const Command* command) {
      for (Worker& worker : workers_) {
        if (worker.flights.empty() || worker.flights.front().command != command) continue;
        unwanted.push_back(&worker);
        return true;
      }
      return false;  // a worker has other commands to do first
    });
    ledger_.count.killed_cancelled += static_cast<int64_t>(unwanted.size());
  }
  for (Worker* worker : unwanted) kill(*worker, End::cancelled, now);
  for (Worker& worker : workers_) {
    if (worker.next_poll && *worker.next_poll <= now) look_at_memory(worker, now);
    if (!worker.deadline || *worker.deadline > now) continue;
    if (worker.phase == Phase::dying) {
      settle_flights(worker, std::nullopt, now);
      undead_.push_back(std::move(worker.child));
      vacate(worker);
    } else {
      if (worker.phase == Phase::starting) {
        worker.why = "no `ready` line within " + std::to_string(settings_.start_timeout_s) + " s";
      }
      kill(worker, worker.late, now);
    }
  }
  std::erase_if(undead_, [](Child& child) {
    pollfd ended{child.pidfd.get(), POLLIN, 0};
    if (poll(&ended, 1, 0) != 1) return false;
    child.reap();
    return true;
  });
}

void Loop::look_at_memory(Worker& worker, Time now) {
  const int64_t bytes = resident_bytes(worker.child.pid, worker.descendants);
  worker.looked = now;
  worker.next_poll = after(now, settings_.poll_s);
  if (bytes <= settings_.memory_bytes) return;
  if (worker.phase == Phase::starting) worker.why = "it needed more than `memory_bytes` to start";
  kill(worker, End::memory, now);
}

void Loop::stop() {
  {
    const Lock held(ledger_.mutex);
    for (Worker& worker : workers_) {
      for (const Flight& flight : worker.flights) {
        if (flight.kind != Flight::Kind::probe) ledger_.finish(flight.command, Answer(End::cancelled), Clock::now());
      }
      worker.flights.clear();
    }
    ledger_.finish_queued(Answer(End::cancelled), nullptr);
    ledger_.take_news();
  }
  ledger_.notify(2);
  const Time until = after(Clock::now(), kStopPatience_s);
  for (Worker& worker : workers_) {
    if (worker.phase == Phase::vacant) continue;
    worker.child.kill_all(worker.descendants, true);
  }
  for (Worker& worker : workers_) {
    if (worker.phase == Phase::vacant) continue;
    pollfd ended{worker.child.pidfd.get(), POLLIN, 0};
    const double left_s = seconds_between(Clock::now(), until);
    int done;
    do {
      done = poll(&ended, 1, std::max(0, static_cast<int>(left_s * 1000)));
    } while (done < 0 && errno == EINTR);
    if (done == 1) worker.child.reap();
    vacate(worker);
  }
}

}  // namespace fdfast::replio
