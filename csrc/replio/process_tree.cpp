// A worker and all that it started, read from /proc; see process.hpp.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "process.hpp"

namespace fdfast::replio {

namespace {

// A file of /proc as text; empty where the process has ended.
std::string read_proc(const char* path) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  std::string text;
  char chunk[4096];
  for (ssize_t count; (count = read(fd, chunk, sizeof chunk)) > 0;) text.append(chunk, static_cast<size_t>(count));
  close(fd);
  return text;
}

struct Stat {
  pid_t group;
  uint64_t start_ticks;
  int64_t resident_pages;
};

// /proc/PID/stat, whose second field, the program's name, may hold anything.
bool read_stat(pid_t pid, Stat& stat) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const std::string text = read_proc(path);
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return false;
  const char* field = text.c_str() + name_end + 2;  // the third
  for (int number = 3; *field; ++number) {
    if (number == 5) stat.group = static_cast<pid_t>(std::strtol(field, nullptr, 10));
    if (number == 22) stat.start_ticks = std::strtoull(field, nullptr, 10);
    if (number == 24) {
      stat.resident_pages = std::strtoll(field, nullptr, 10);
      return true;
    }
    field = std::strchr(field, ' ');
    if (!field) return false;
    ++field;
  }
  return false;
}

// The children of all threads of a process.
void add_children(pid_t pid, std::vector<pid_t>& children) {
  char path[320];
  std::snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR* const tasks = opendir(path);
  if (!tasks) return;
  while (const dirent* const task = readdir(tasks)) {
    if (task->d_name[0] == '.') continue;
    std::snprintf(path, sizeof path, "/proc/%d/task/%s/children", pid, task->d_name);
    const std::string text = read_proc(path);
    for (const char* at = text.c_str(); *at;) {
      char* end;
      const long child = std::strtol(at, &end, 10);
      if (end == at) break;
      children.push_back(static_cast<pid_t>(child));
      at = end + std::strspn(end, " \n");
    }
  }
  closedir(tasks);
}

// Kills a process that is still the one that was seen; the pidfd keeps it so between the look and the kill.
void kill_if_same(const Descendant& seen, pid_t group) {
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, seen.pid, 0));
  if (pidfd < 0) return;
  Stat stat{};
  if (read_stat(seen.pid, stat) && stat.start_ticks == seen.start_ticks && stat.group != group) {
    syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, nullptr, 0);
  }
  close(pidfd);
}

}  // namespace

int64_t resident_bytes(pid_t pid, std::vector<Descendant>& found) {
  static const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  found.clear();
  int64_t pages = 0;
  std::vector<pid_t> all = {pid};
  for (size_t i = 0; i < all.size(); ++i) {
    Stat stat{};
    if (!read_stat(all[i], stat)) continue;
    pages += stat.resident_pages;
    if (i > 0) found.push_back({all[i], stat.start_ticks});
    add_children(all[i], all);
  }
  return pages * page_bytes;
}

void Child::kill_all(const std::vector<Descendant>& known, bool lives) const {
  // A descendant that made a session of its own is found only while its parents live, so look first.
  std::vector<Descendant> today;
  if (lives) resident_bytes(pid, today);
  kill(-pid, SIGKILL);
  for (const auto& descendant : today) kill_if_same(descendant, pid);
  for (const auto& descendant : known) kill_if_same(descendant, pid);
}

}  // namespace fdfast::replio
