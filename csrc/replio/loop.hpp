// The I/O thread: one epoll loop over the pipes of all workers, which it starts, feeds, watches and ends.
//
// It alone touches the workers, so they need no lock. It is also the thread that starts them, because the signal that
// a worker gets at its parent's death is tied to the thread.
#pragma once

#include <sys/epoll.h>

#include <mutex>
#include <string>
#include <vector>

#include "guard.hpp"
#include "ledger.hpp"
#include "process.hpp"
#include "worker.hpp"

namespace fdfast::replio {

inline constexpr double kHeldNews_s = 200e-6;  // news of an answer is held back no longer

class Loop {
 public:
  Loop(const Settings& settings, Ledger& ledger);  // throws MachineFault
  void run();                                      // until the ledger is told to stop

 private:
  using Lock = std::unique_lock<std::mutex>;
  enum class Stream : uint8_t { input, out, errors, end };

  // Waiting: loop.cpp.
  void set_timer();
  void handle(const epoll_event& event, Time now);
  void sweep(Time now);
  void look_at_memory(Worker& worker, Time now);
  void stop();
  void watch(const Worker& worker, const Fd& fd, Stream stream, uint32_t events);
  void unwatch(const Fd& fd);

  // Giving work: loop_feed.cpp.
  bool dispatch(Time now);  // false: stop
  void tell(int news, bool more_to_come, Time now);
  void start(Worker& worker, Command* command, Time now);
  void start_failed(const std::string& why, Time now);
  void feed(Worker& worker, bool only_held, Time now, const Lock& held);
  void board(Worker& worker, Command* command, Time now, std::optional<int64_t> env = {});
  void launch(Worker& worker, Flight::Kind kind, Command* command, std::string prefix, std::string_view body);
  void set_out(Worker& worker, Time now);
  void flush(Worker& worker, Time now);

  // Taking answers and ends: loop_answers.cpp.
  void read_out(Worker& worker, Time now);
  void cut(Worker& worker, Time now);
  void on_frame(Worker& worker, Bytes frame, Time now);
  void send_probe(Worker& worker, Time now);
  void accept(Worker& worker, Bytes frame, Time now);
  void accept_header(Worker& worker, Bytes frame, Time now);
  void accept_command(Worker& worker, Bytes frame, Time now);
  Answer answer_of(Worker& worker, End end, Bytes raw, Time now) const;
  bool is_spent(Worker& worker, Time now);
  void kill(Worker& worker, End verdict, Time now);
  void on_end(Worker& worker, Time now);
  void settle_flights(Worker& worker, std::optional<int> status, Time now);
  void vacate(Worker& worker);

  const Settings& settings_;
  Ledger& ledger_;
  const Launch launch_;
  Guard guard_;
  Fd epoll_, timer_;
  Time armed_ = Time::max();  // for when the timer is set; never later than what is due
  std::vector<Worker> workers_;
  std::vector<Child> undead_;  // killed, and not ended in time: stuck in the kernel
  int failures_ = 0;           // starts in a row that failed
  Time not_before_{};          // no start
  int news_ = 0;               // answers that those who wait for any have not been told of
  Time news_since_{}, last_news_{};
  double news_gap_s_ = 1;      // between answers, on the average
};

}  // namespace fdfast::replio
