// The worker of the C++ tests; see worker.hpp.
#include "worker.hpp"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace worker {

namespace {

bool read_more(std::string& text) {
  char chunk[65536];
  const ssize_t count = read(0, chunk, sizeof chunk);
  if (count > 0) text.append(chunk, static_cast<size_t>(count));
  return count > 0;
}

void print(const std::string& text, int fd = 1) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t count = write(fd, text.data() + at, text.size() - at);
    if (count <= 0) _exit(4);
    at += static_cast<size_t>(count);
  }
}

// The number after a word, -1 where the word is not there.
long number(const std::string& command, const char* word) {
  const size_t at = command.find(std::string(word) + " ");
  return at == std::string::npos ? -1 : std::atol(command.c_str() + at + std::strlen(word) + 1);
}

bool has(const std::string& command, const char* word) { return command.find(word) != std::string::npos; }

[[noreturn]] void hang() {
  while (true) pause();
}

[[noreturn]] void sleep_and_exit() {
  sleep(30);
  _exit(0);
}

void do_what_it_says(const std::string& command) {
  static std::vector<char*> kept;
  static int environments = 0;
  if (const long bytes = number(command, "err"); bytes > 0) print(std::string(static_cast<size_t>(bytes), 'e'), 2);
  if (const long megabytes = number(command, "touch"); megabytes > 0) {
    const size_t bytes = static_cast<size_t>(megabytes) << 20;
    kept.push_back(static_cast<char*>(std::malloc(bytes)));
    std::memset(kept.back(), 1, bytes);
  }
  if (const long status = number(command, "die"); status >= 0) _exit(static_cast<int>(status));
  if (has(command, "segv")) {
    signal(SIGSEGV, SIG_DFL);  // a sanitizer has a handler
    raise(SIGSEGV);
  }
  if (has(command, "half")) {
    print("{\"half");
    _exit(5);
  }
  if (has(command, "shut")) close(1);
  if (has(command, "child-out")) {
    if (fork() == 0) {
      setsid();
      sleep_and_exit();
    }
    hang();
  }
  if (has(command, "child")) {
    if (fork() == 0) sleep_and_exit();
    _exit(3);
  }
  if (has(command, "hang") || has(command, "shut")) hang();
  if (const long ms = number(command, "sleep"); ms > 0) usleep(static_cast<useconds_t>(ms) * 1000);
  if (has(command, "forge")) print("{\"env\": 0}\n\n");
  std::string answer = "{\"got\": \"" + command + "\"}";
  if (has(command, "\"cmd\"")) {
    answer = has(command, "bad") ? "{\"message\": \"no\"}" : "{\"env\": " + std::to_string(environments++) + "}";
  }
  if (const size_t at = command.find("ask "); at != std::string::npos) answer = command.substr(at + 4);
  if (const long bytes = number(command, "big"); bytes > 0) answer = std::string(static_cast<size_t>(bytes), 'x');
  print(answer + "\n\n" + (has(command, "twice") ? answer + "\n\n" : ""));
  if (const long status = number(command, "after"); status >= 0) _exit(static_cast<int>(status));
}

}  // namespace

int run() {
  std::string text;
  while (true) {
    const size_t end = text.find("\n\n");
    if (end == std::string::npos) {
      if (!read_more(text)) return 0;
      continue;
    }
    const std::string command = text.substr(0, end);
    text.erase(0, end + 2);
    do_what_it_says(command);
  }
}

int run_once() {
  std::string text;
  while (read_more(text)) {
  }
  if (has(text, "kill")) kill(getpid(), SIGKILL);
  print(text);
  return 7;
}

}  // namespace worker
