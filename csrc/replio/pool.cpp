// A pool of worker processes; see pool.hpp.
#include "pool.hpp"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

#include "framing.hpp"

namespace fdfast::replio {

namespace {

void require(bool holds, const std::string& complaint) {
  if (!holds) throw InputFault("Pool: " + complaint);
}

Settings checked(Settings settings) {
  require(!settings.argv.empty() && !settings.argv.front().empty(),
          "argv must name a program; got none. Give its path and arguments");
  for (const auto* texts : {&settings.argv, &settings.env}) {
    for (const auto& text : *texts) {
      require(text.find('\0') == std::string::npos, "argv and env can't hold a NUL byte; got one in " + text);
    }
  }
  require(settings.workers >= 1 && settings.workers <= 4096,
          "workers must be from 1 to 4096; got " + std::to_string(settings.workers));
  require(settings.depth >= 1 && settings.depth <= 1024,
          "depth must be from 1 to 1024; got " + std::to_string(settings.depth));
  require(settings.timeout_s > 0, "timeout_s must be positive; got " + std::to_string(settings.timeout_s));
  require(settings.start_timeout_s > 0,
          "start_timeout_s must be positive; got " + std::to_string(settings.start_timeout_s));
  require(settings.max_restarts >= 1, "max_restarts must be at least 1; got " + std::to_string(settings.max_restarts));
  require(std::isfinite(settings.poll_s) && settings.poll_s >= 0.001,
          "poll_s must be at least 0.001; got " + std::to_string(settings.poll_s));
  const std::pair<const char*, int64_t> sizes[] = {
      {"memory_bytes", settings.memory_bytes},   {"recycle_bytes", settings.recycle_bytes},
      {"recycle_after", settings.recycle_after}, {"stderr_bytes", settings.stderr_bytes},
      {"cache_bytes", settings.cache_bytes},
  };
  for (const auto& [name, size] : sizes) {
    require(size >= 0, std::string(name) + " can't be negative; got " + std::to_string(size));
  }
  require(settings.answer_bytes >= 1, "answer_bytes must be positive; got " + std::to_string(settings.answer_bytes));
  require(settings.queue_bytes >= 1, "queue_bytes must be positive; got " + std::to_string(settings.queue_bytes));
  if (settings.mode == Mode::once) {
    require(settings.ready.empty() && settings.probe.empty() && settings.depth == 1 && !settings.recycle_after &&
                !settings.recycle_bytes,
            "in mode \"once\" each command has its own process, so ready, probe, depth, recycle_after and "
            "recycle_bytes have no meaning; leave them out");
  }
  require(settings.ready.find('\n') == std::string::npos, "ready must be one line, without its newline");
  if (!settings.probe.empty()) {
    require(settings.depth == 1, "probe needs depth 1; got " + std::to_string(settings.depth));
    require(settings.probe.find("%s") != std::string::npos, "probe must hold %s, where the secret goes");
    require(find_blank_line(settings.probe) == kNotFound && settings.probe.back() != '\n' &&
                settings.probe.front() != '\n',
            "probe can't hold a blank line, nor begin or end with a newline");
  }
  return settings;
}

// A command's text goes between blank lines, so it can't hold one.
void check_framing(const std::vector<std::string>& texts, bool has_header, bool chain) {
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::string& text = texts[i];
    const auto which = [i] { return "submit: command " + std::to_string(i); };
    if (text.empty()) throw InputFault(which() + " is empty; a REPL would end at it");
    size_t blank = find_blank_line(text);
    if (text.front() == '\n') blank = 0;
    else if (blank == kNotFound && text.back() == '\n') blank = text.size() - 1;
    if (blank != kNotFound) {
      throw InputFault(which() + " has a newline at its begin or end, or a blank line, at byte " +
                       std::to_string(blank) +
                       ": it would be read as two commands; write newlines inside JSON strings as \\n");
    }
    if ((has_header || (chain && i > 0)) && text[std::min(text.find_first_not_of(" \t\r\n"), text.size() - 1)] != '{') {
      throw InputFault(which() + " must be the text of a JSON object, so that an \"env\" can be put into it; got " +
                       text.substr(0, 40));
    }
  }
}

}  // namespace

Pool::Pool(Settings settings)
    : settings_(checked(std::move(settings))), process_(getpid()), ledger_(settings_), loop_(settings_, ledger_) {
  // The thread takes no signal: they are for the interpreter's own, and a broken pipe is an errno here.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread(&Loop::run, &loop_);
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw MachineFault(std::string("Pool: no thread can be started: ") + error.what() + "; raise `ulimit -u`");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

bool Pool::is_foreign() const { return getpid() != process_; }

void Pool::check_process() const {
  if (!is_foreign()) return;
  throw std::runtime_error("Pool: process " + std::to_string(getpid()) + " was forked off process " +
                           std::to_string(process_) + ", which owns this pool; make a new Pool here");
}

bool Pool::submit(std::vector<std::string> texts, const std::string& header, double timeout_s, bool unique,
                  const Patience& patience, TicketId& first, bool chain) {
  if (settings_.mode == Mode::repl) {
    check_framing(texts, !header.empty(), chain);
  } else if (!header.empty() || chain) {
    throw InputFault("submit: header and chain need mode \"repl\"; in mode \"once\" put all into one command");
  }
  if (!(timeout_s > 0)) throw InputFault("submit: timeout_s must be positive; got " + std::to_string(timeout_s));
  size_t bytes = 0;
  for (const auto& text : texts) bytes += text.size();
  while (true) {
    switch (ledger_.submit(texts, header, timeout_s, unique, first, chain)) {
      case Ledger::Booked::all:
        return true;
      case Ledger::Booked::closed:
        throw InputFault("submit: the pool is closed; make a new Pool");
      case Ledger::Booked::full:
        if (!ledger_.wait_for_room(bytes, patience)) return false;
    }
  }
}

Counts Pool::counts() {
  Counts counts = ledger_.counts();
  std::vector<Descendant> descendants;
  for (const int pid : ledger_.pids()) counts.rss_bytes += resident_bytes(pid, descendants);
  return counts;
}

void Pool::close() {
  const std::lock_guard lock(closing_);
  ledger_.request_stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace fdfast::replio
