// The I/O thread's waiting; see loop.hpp.
#include "loop.hpp"

#include <poll.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "event.hpp"

namespace fdfast::replio {

namespace {

constexpr uint64_t kWake = ~uint64_t{0};
constexpr uint64_t kTimer = kWake - 1;
constexpr int kMostEvents = 128;
constexpr double kStopPatience_s = 5;

// Opens a descriptor under the eyes of fork().
template <typename Open>
Fd opened(const char* what, const Open& open) {
  const auto held = hold_forks();
  const int fd = open();
  if (fd < 0) throw MachineFault(std::string("Pool: ") + what + ": " + std::strerror(errno) + "; raise `ulimit -n`");
  return Fd(fd);
}

}  // namespace

Loop::Loop(const Settings& settings, Ledger& ledger)
    : settings_(settings),
      ledger_(ledger),
      launch_{settings.argv, settings.env, settings.cwd},
      guard_(settings.workers),
      epoll_(opened("epoll", [] { return epoll_create1(EPOLL_CLOEXEC); })),
      timer_(opened("timerfd", [] { return timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK); })),
      workers_(static_cast<size_t>(settings.workers)) {
  for (size_t i = 0; i < workers_.size(); ++i) workers_[i].index = static_cast<int>(i);
  epoll_event wake{.events = EPOLLIN, .data = {.u64 = kWake}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, ledger_.wake_fd(), &wake);
  epoll_event timer{.events = EPOLLIN, .data = {.u64 = kTimer}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, timer_.get(), &timer);
}

void Loop::run() {
  prctl(PR_SET_NAME, "fdfast-replio");
  epoll_event events[kMostEvents];
  Time now = Clock::now();
  while (true) {
    if (!dispatch(now)) break;
    set_timer();
    const int count = epoll_wait(epoll_.get(), events, kMostEvents, -1);
    now = Clock::now();
    // What a worker said on stderr before its answer belongs to it, so stderr is read first; the end comes last.
    for (const auto stream : {Stream::errors, Stream::input, Stream::out, Stream::end}) {
      for (int i = 0; i < count; ++i) {
        const uint64_t source = events[i].data.u64;
        if (source < kTimer && static_cast<Stream>(source & 3) == stream) handle(events[i], now);
      }
    }
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == kWake) ledger_.clear_wake();
      if (events[i].data.u64 == kTimer) {
        clear_event(timer_);
        armed_ = Time::max();
      }
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

// Sets the timer to what is due first, if that is before what it is set to. Mostly deadlines move away before they
// come, and the timer is left alone: it goes off early once in a while, which does no harm.
void Loop::set_timer() {
  Time first = news_ ? after(news_since_, kHeldNews_s) : Time::max();
  for (const Worker& worker : workers_) {
    if (worker.deadline) first = std::min(first, *worker.deadline);
    if (worker.next_poll) first = std::min(first, *worker.next_poll);
  }
  if (failures_ > 0 && not_before_ > Clock::now()) first = std::min(first, not_before_);
  if (!undead_.empty()) first = std::min(first, after(Clock::now(), 1));
  if (first >= armed_) return;
  armed_ = first;
  const auto ns = std::max<int64_t>(1, std::chrono::nanoseconds(first.time_since_epoch()).count());
  const itimerspec when{{0, 0}, {ns / 1'000'000'000, ns % 1'000'000'000}};
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
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
  worker.resident_bytes = bytes;
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
    if (done == 1) {
      guard_.set(worker.index, 0);
      worker.child.reap();
    }
    vacate(worker);
  }
  guard_.close();
}

}  // namespace fdfast::replio
