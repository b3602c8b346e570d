// The pool under each fault, and many threads at once: every ticket is answered exactly once, as it should be.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <cstdio>
#include <random>
#include <thread>

#include "check.hpp"
#include "pool.hpp"
#include "worker.hpp"

using namespace fdfast::replio;

namespace {

std::string self;

Settings settings(int workers = 1, const char* role = "worker") {
  Settings made;
  made.argv = {self, role};
  made.workers = workers;
  made.timeout_s = 20;  // a sanitizer is slow, and the machine may be busy
  return made;
}

Patience patience(double seconds = 30) { return {after(Clock::now(), seconds), std::chrono::hours(1), {}}; }

std::vector<TicketId> submit(Pool& pool, std::vector<std::string> texts, const std::string& header = "",
                             double timeout_s = 20, bool unique = false, bool chain = false) {
  std::vector<TicketId> tickets(texts.size());
  TicketId first = 0;
  CHECK(pool.submit(std::move(texts), header, timeout_s, unique, patience(), first, chain));
  for (size_t i = 0; i < tickets.size(); ++i) tickets[i] = first + static_cast<TicketId>(i);
  return tickets;
}

Answer wait(Pool& pool, TicketId ticket) {
  Answer answer;
  CHECK(pool.ledger().wait(ticket, answer, patience()) == Ledger::Got::answer);
  return answer;
}

Answer ask(Pool& pool, const std::string& text, const std::string& header = "", double timeout_s = 20) {
  return wait(pool, submit(pool, {text}, header, timeout_s).front());
}

std::string raw(const Answer& answer) { return answer.payload ? std::string(answer.payload->raw.view()) : ""; }

bool is(const Answer& answer, End end, std::optional<int> status = std::nullopt) {
  return answer.end == end && answer.status == status;
}

std::string seen(const Answer& answer) {
  return std::string(kEndNames[static_cast<size_t>(answer.end)]) + " " +
         (answer.status ? std::to_string(*answer.status) : "-") + " " + raw(answer).substr(0, 100) + " " +
         (answer.payload ? answer.payload->errors.substr(0, 200) : "");
}

bool lives(int pid) { return kill(pid, 0) == 0 || errno == EPERM; }

// Dead, reaped or not.
bool has_ended(int pid) {
  FILE* const file = std::fopen(("/proc/" + std::to_string(pid) + "/stat").c_str(), "r");
  if (!file) return true;
  char text[512] = "";
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  return length == 0 || std::strrchr(text, ')')[2] == 'Z';
}

bool is_gone(int pid) {
  for (int i = 0; i < 500 && lives(pid); ++i) usleep(10'000);
  return !lives(pid);
}

void commands_are_answered_in_their_order_by_one_worker() {
  for (const int depth : {1, 3}) {
    Settings made = settings();
    made.depth = depth;
    Pool pool(made);
    std::vector<std::string> texts;
    for (int i = 0; i < 200; ++i) texts.push_back("c" + std::to_string(i));
    const auto tickets = submit(pool, texts);
    for (size_t i = 0; i < tickets.size(); ++i) {
      Answer answer;
      CHECK(pool.ledger().next(answer, patience()) == Ledger::Got::answer);
      CHECK_SEEING(answer.ticket == tickets[i] && raw(answer) == "{\"got\": \"" + texts[i] + "\"}", seen(answer));
    }
    Answer none;
    CHECK(pool.ledger().next(none, patience()) == Ledger::Got::none);
  }
}

void each_death_ends_its_command_alone() {
  Pool pool(settings());
  const std::pair<const char*, int> deaths[] = {{"die 6", 6}, {"segv", -11}, {"half", 5}, {"child now", 3}};
  for (const auto& [text, status] : deaths) {
    const auto tickets = submit(pool, {"before", text, "behind"});
    CHECK(is(wait(pool, tickets[0]), End::answer));
    const Answer answer = wait(pool, tickets[1]);
    CHECK_SEEING(is(answer, End::crashed, status), seen(answer));
    CHECK(is(wait(pool, tickets[2]), End::answer));
  }
  CHECK(raw(ask(pool, "half")) == "{\"half");
  const Answer last = ask(pool, "after 9");
  CHECK_SEEING(last.end == End::answer, seen(last));
  const Answer shut = ask(pool, "shut");
  CHECK_SEEING(is(shut, End::crashed, -SIGKILL), seen(shut));
  CHECK(pool.counts().requeued >= 0 && is(ask(pool, "x"), End::answer));
}

void a_worker_killed_while_idle_costs_nothing() {
  Pool pool(settings());
  for (int i = 0; i < 20; ++i) {
    CHECK(is(ask(pool, "x"), End::answer));
    const auto pids = pool.ledger().pids();
    kill(pids.front(), SIGKILL);
    while (!has_ended(pids.front())) usleep(100);
    const Answer answer = ask(pool, "y");  // at once: the pool may not have heard of the death
    CHECK_SEEING(is(answer, End::answer), seen(answer));
  }
}

void a_late_command_is_killed_and_those_behind_it_run() {
  Settings made = settings();
  made.depth = 2;
  Pool pool(made);
  const auto late = submit(pool, {"hang", "x"}, "", 0.2);
  const Answer answer = wait(pool, late[0]);
  CHECK_SEEING(is(answer, End::timeout, -SIGKILL) && answer.seconds >= 0.2, seen(answer));
  CHECK(is(wait(pool, late[1]), End::answer));
}

void a_descendant_in_its_own_session_is_killed_too() {
  Pool pool(settings());
  const auto ticket = submit(pool, {"child-out"}, "", 1).front();
  usleep(300'000);  // until it is there
  std::vector<Descendant> descendants;
  const auto pids = pool.ledger().pids();
  CHECK(pids.size() == 1);
  resident_bytes(pids.front(), descendants);
  CHECK(descendants.size() == 1);
  CHECK(is(wait(pool, ticket), End::timeout, -SIGKILL));
  for (const auto& descendant : descendants) CHECK(is_gone(descendant.pid));
}

void limits_of_memory_answer_and_stderr_hold() {
  Settings made = settings();
  made.memory_bytes = int64_t{600} << 20;  // a sanitizer's own share is large
  made.answer_bytes = 1 << 20;
  made.stderr_bytes = 1000;
  Pool pool(made);
  const Answer balloon = ask(pool, "touch 800 hang");
  CHECK_SEEING(is(balloon, End::memory, -SIGKILL), seen(balloon));
  CHECK(is(ask(pool, "big 1000000"), End::answer));
  for (const char* text : {"big 1048577", "big 5000000"}) {
    const Answer answer = ask(pool, text);
    CHECK_SEEING(is(answer, End::overflow, -SIGKILL) && raw(answer).size() == 64 << 10, seen(answer));
  }
  const Answer chatty = ask(pool, "err 2000000");
  CHECK(is(chatty, End::answer) && chatty.payload->errors == std::string(1000, 'e'));
}

void a_header_is_sent_once_to_a_worker_and_its_environment_put_in() {
  Settings made = settings();
  made.start_timeout_s = 0.5;
  Pool pool(made);
  CHECK(raw(ask(pool, "{\"a\": 1}", "import A")) == "{\"got\": \"{\"env\": 0, \"a\": 1}\"}");
  CHECK(raw(ask(pool, "{\"a\": 2}", "import B")) == "{\"got\": \"{\"env\": 1, \"a\": 2}\"}");
  CHECK(raw(ask(pool, "{}", "import A")) == "{\"got\": \"{\"env\": 0}\"}");
  CHECK(pool.counts().headers == 2);
  const auto tickets = submit(pool, {"{\"a\": 3}", "{\"a\": 4}"}, "bad");
  for (const TicketId ticket : tickets) {
    const Answer answer = wait(pool, ticket);
    CHECK_SEEING(is(answer, End::header) && raw(answer) == "{\"message\": \"no\"}", seen(answer));
  }
  CHECK(pool.counts().headers == 3);
  CHECK(is(ask(pool, "{\"a\": 3}", "die 4"), End::crashed, 4));
  CHECK(is(ask(pool, "{\"a\": 3}", "hang"), End::timeout, -SIGKILL));
}

void a_chain_runs_on_one_worker_in_the_environment_of_the_last_answer() {
  Pool pool(settings(3));
  for (int i = 0; i < 10; ++i) {
    const std::string self_of = std::to_string(i);
    const auto tickets = submit(pool, {"{\"cmd\": 1}", "{\"cmd\": 2}", "{\"a\": " + self_of + "}", "{}"}, "", 20, false, true);
    const std::string env = raw(wait(pool, tickets[1]));
    const Answer third = wait(pool, tickets[2]);
    CHECK_SEEING(raw(third) == "{\"got\": \"" + env.substr(0, env.size() - 1) + ", \"a\": " + self_of + "}\"}", seen(third));
    CHECK(is(wait(pool, tickets[3]), End::header));  // the third gave no environment
    CHECK(is(wait(pool, tickets[0]), End::answer));
  }
  auto tickets = submit(pool, {"{\"cmd\": 1}", "{\"die 3\": 1}", "{}"}, "", 20, false, true);
  CHECK(is(wait(pool, tickets[1]), End::crashed, 3) && is(wait(pool, tickets[2]), End::header));
  tickets = submit(pool, {"{\"cmd\": \"after 3\"}", "{}", "{}"}, "", 20, false, true);  // dies between two
  CHECK(wait(pool, tickets[1]).end == End::crashed && is(wait(pool, tickets[2]), End::header));
  tickets = submit(pool, {"{\"hang\": 1}", "{}", "{}"}, "", 20, false, true);
  CHECK(pool.ledger().cancel({tickets[1]}) == 1 && pool.ledger().cancel({tickets[0]}) == 1);
  CHECK(wait(pool, tickets[0]).end == End::cancelled && wait(pool, tickets[2]).end == End::cancelled);
  const Counts counts = pool.counts();
  CHECK(counts.answered == counts.submitted && counts.queued == 0 && counts.requeued == 0);
}

void equal_commands_share_an_answer_unless_unique() {
  Settings made = settings(2);
  made.cache_bytes = 1000;
  Pool pool(made);
  const auto tickets = submit(pool, {"sleep 50", "sleep 50", "sleep 50"});
  int shared = 0;
  for (const TicketId ticket : tickets) shared += wait(pool, ticket).shared;
  CHECK(shared == 2);
  CHECK(ask(pool, "sleep 50").shared);
  CHECK(!ask(pool, "sleep 50", "", 21).shared);  // another time limit is another command
  for (int i = 0; i < 50; ++i) ask(pool, "filler " + std::to_string(i));
  CHECK(!ask(pool, "sleep 50").shared);
  for (const TicketId ticket : submit(pool, {"u", "u"}, "", 20, true)) CHECK(!wait(pool, ticket).shared);
}

void cancelled_tickets_end_so_and_free_the_worker() {
  Pool pool(settings());
  const auto tickets = submit(pool, {"hang", "x", "hang"});
  usleep(100'000);
  CHECK(pool.ledger().cancel({tickets[2]}) == 1);  // the same command as the first
  CHECK(pool.ledger().cancel({tickets[2], 99}) == 0);
  CHECK(wait(pool, tickets[2]).end == End::cancelled);
  CHECK(pool.counts().running == 1);
  CHECK(pool.ledger().cancel({tickets[0]}) == 1);
  CHECK(wait(pool, tickets[0]).end == End::cancelled);
  CHECK(is(wait(pool, tickets[1]), End::answer));
  CHECK(pool.counts().killed_cancelled == 1);
}

void a_forged_answer_is_seen_by_the_probe() {
  Settings made = settings();
  made.probe = "ask %s";
  Pool pool(made);
  for (int i = 0; i < 3; ++i) {
    CHECK(raw(ask(pool, "x")) == "{\"got\": \"x\"}");
    const Answer answer = ask(pool, "forge");
    CHECK_SEEING(is(answer, End::forged, -SIGKILL) && raw(answer) == "{\"env\": 0}", seen(answer));
    CHECK(ask(pool, "twice").end == End::forged);
  }
  Pool open(settings());
  CHECK(is(ask(open, "twice"), End::answer));
  usleep(50'000);
  CHECK(raw(ask(open, "x")) == "{\"got\": \"x\"}");
  CHECK(open.counts().unsolicited == 1);
}

void in_mode_once_an_answer_is_all_of_stdout() {
  Settings made = settings(3, "once");
  made.mode = Mode::once;
  Pool pool(made);
  const std::string large(3 << 20, 'y');
  CHECK(is(ask(pool, "kill"), End::crashed, -SIGKILL));
  for (const std::string& text : {std::string("a\n\nb"), std::string(), large}) {
    const Answer answer = ask(pool, text);
    CHECK_SEEING(is(answer, End::answer, 7) && raw(answer) == text, seen(answer));
  }
}

void starts_that_fail_end_as_unavailable() {
  Settings missing;
  missing.argv = {"/nonexistent/repl"};
  missing.max_restarts = 3;
  Settings dead = missing, mute = missing, folder = missing;
  dead.argv = {"/bin/false"};
  mute.argv = {"/bin/sleep", "60"};
  mute.ready = "ready";
  mute.start_timeout_s = 0.1;
  folder.argv = {self, "worker"};
  folder.cwd = "/nonexistent";
  for (const Settings& made : {missing, dead, mute, folder}) {
    Pool pool(made);
    for (const TicketId ticket : submit(pool, {"x", "y"})) {
      const Answer answer = wait(pool, ticket);
      CHECK_SEEING(answer.end == End::unavailable && !answer.payload->errors.empty(), seen(answer));
    }
    CHECK(pool.counts().failed_starts == 3);
  }
}

void a_full_queue_waits_for_fetched_answers() {
  Settings made = settings();
  made.queue_bytes = 1000;
  Pool pool(made);
  TicketId first = 0;
  CHECK(pool.submit({std::string(5000, 'a')}, "", 20, false, patience(0), first));  // alone it may be too long
  CHECK(!pool.submit({"b"}, "", 20, false, patience(0.05), first));
  CHECK(is(wait(pool, 0), End::answer));
  CHECK(pool.submit({"b"}, "", 20, false, patience(), first));
  CHECK(is(wait(pool, first), End::answer));
  // Unfetched answers hold the next command back, unless a thread waits for one by name.
  const auto tickets = submit(pool, {"big 2000", "c", "d"});
  for (int i = 0; i < 500 && pool.counts().unfetched == 0; ++i) usleep(10'000);
  usleep(50'000);
  CHECK(pool.counts().unfetched == 1);
  CHECK(is(wait(pool, tickets[2]), End::answer));
  CHECK(pool.ledger().ready().size() == 2);
}

void close_ends_all_and_leaves_nothing() {
  Settings made = settings(2);
  Pool pool(made);
  const auto tickets = submit(pool, {"hang", "child-out", "x", "y"});
  usleep(200'000);
  const auto pids = pool.ledger().pids();
  CHECK(pids.size() == 2);
  std::thread waiting([&] { CHECK(wait(pool, tickets[2]).end == End::cancelled); });
  pool.close();
  pool.close();
  waiting.join();
  for (const int pid : pids) CHECK(!lives(pid));
  CHECK(pool.ledger().ready().size() == 3);
  CHECK(pool.ledger().pids().empty());
  bool refused = false;
  TicketId first = 0;
  try {
    pool.submit({"z"}, "", 20, false, patience(), first);
  } catch (const InputFault&) {
    refused = true;
  }
  CHECK(refused);
}

// Threads submit, wait by name or for any, cancel and look around while workers die under them.
void many_threads_and_faults_lose_nothing() {
  Settings made = settings(3);
  made.depth = 2;
  made.cache_bytes = 10'000;
  Pool pool(made);
  std::atomic<int> given{0}, fetched{0};
  std::atomic<bool> done{false};
  const auto body = [&](unsigned seed) {
    std::mt19937 random(seed);
    const char* const texts[] = {"x", "y", "sleep 1", "die 3", "half", "err 5000", "after 1", "big 100000"};
    const char* const chained[] = {"{\"cmd\": 1}", "{\"cmd\": 1}", "{\"die 3\": 1}", "{\"cmd\": \"after 1\"}"};
    for (int round = 0; round < 60; ++round) {
      std::vector<std::string> batch;
      const bool chain = random() % 4 == 0;
      for (size_t i = 0; i < 1 + random() % 4; ++i) {
        batch.push_back(chain ? chained[random() % 4] : texts[random() % 8] + std::string(" # ") + std::to_string(random() % 20));
      }
      const auto tickets = submit(pool, batch, "", 20, random() % 4 == 0, chain);
      given += static_cast<int>(tickets.size());
      if (random() % 3 == 0) pool.ledger().cancel({tickets[random() % tickets.size()]});
      if (random() % 2) {
        Answer answer;
        if (pool.ledger().wait(tickets.back(), answer, patience()) == Ledger::Got::answer) ++fetched;
      }
      pool.counts();
    }
  };
  std::thread any([&] {
    while (true) {
      Answer answer;
      const bool over = done;
      const auto got = pool.ledger().next(answer, patience(0.05));
      if (got == Ledger::Got::answer) ++fetched;
      else if (over) return;
    }
  });
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed) threads.emplace_back(body, seed);
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < 3000 && fetched < given; ++i) usleep(10'000);
  done = true;
  any.join();
  CHECK_SEEING(fetched == given, std::to_string(fetched) + " of " + std::to_string(given));
  const Counts counts = pool.counts();
  CHECK(counts.answered == counts.submitted && counts.unfetched == 0 && counts.held_bytes == 0);
}

}  // namespace

int main(int argc, char** argv) {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  self.assign(path, static_cast<size_t>(length));
  if (argc > 1 && !std::strcmp(argv[1], "worker")) return worker::run();
  if (argc > 1 && !std::strcmp(argv[1], "once")) return worker::run_once();
  commands_are_answered_in_their_order_by_one_worker();
  each_death_ends_its_command_alone();
  a_worker_killed_while_idle_costs_nothing();
  a_late_command_is_killed_and_those_behind_it_run();
  a_descendant_in_its_own_session_is_killed_too();
  limits_of_memory_answer_and_stderr_hold();
  a_header_is_sent_once_to_a_worker_and_its_environment_put_in();
  a_chain_runs_on_one_worker_in_the_environment_of_the_last_answer();
  equal_commands_share_an_answer_unless_unique();
  cancelled_tickets_end_so_and_free_the_worker();
  a_forged_answer_is_seen_by_the_probe();
  in_mode_once_an_answer_is_all_of_stdout();
  starts_that_fail_end_as_unavailable();
  a_full_queue_waits_for_fetched_answers();
  close_ends_all_and_leaves_nothing();
  many_threads_and_faults_lose_nothing();
  return checks::result("pool");
}
