// Starting and reaping a worker; see process.hpp.
#include "process.hpp"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "types.hpp"

#if defined(__SANITIZE_THREAD__)
// The sanitizer's own clone() resets its books in the child, which are ours here; glibc has it under this name, too.
extern "C" int __clone(int (*function)(void*), void* stack, int flags, void* argument, ...);
#define clone __clone
#endif

namespace fdfast::replio {

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kPipeBytes = 1 << 20;

// All that the child needs, so that it need not allocate.
struct Birth {
  const char* path;
  char* const* argv;
  char* const* env;
  const char* cwd;  // null: ours
  int in, out, errors;
  bool dies_with_us;
  pid_t parent;
  const char* failed_call = nullptr;  // set by the child, whose memory is ours
  int error = 0;
};

void close_from(unsigned first) {
  if (syscall(SYS_close_range, first, ~0U, 0) == 0) return;
  for (long fd = first, end = sysconf(_SC_OPEN_MAX); fd < end; ++fd) syscall(SYS_close, fd);  // before Linux 5.9
}

// Runs in the child, on a stack of its own but in our memory, until exec: bare system calls alone, since the C
// library's wrappers (and a sanitizer's) would keep books that are ours.
int be_born(void* argument) {
  auto& birth = *static_cast<Birth*>(argument);
  const auto require = [&birth](long result, const char* call) {
    if (result >= 0) return;
    birth.failed_call = call;
    birth.error = errno;
    syscall(SYS_exit_group, 127);
  };
  // No handler of ours may run here, and an ignored signal would stay ignored in the program. Zeros mean SIG_DFL.
  constexpr size_t kMaskBytes = 8;
  const uint64_t standard[8] = {};
  for (int signal = 1; signal <= 64; ++signal) syscall(SYS_rt_sigaction, signal, standard, nullptr, kMaskBytes);
  require(syscall(SYS_setsid), "setsid");
  if (birth.dies_with_us) {
    require(syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL), "prctl");
    if (syscall(SYS_getppid) != birth.parent) syscall(SYS_exit_group, 127);  // it died before the line above
  }
  require(syscall(SYS_dup3, birth.in, 0, 0), "dup3");
  require(syscall(SYS_dup3, birth.out, 1, 0), "dup3");
  require(syscall(SYS_dup3, birth.errors, 2, 0), "dup3");
  close_from(3);
  if (birth.cwd) require(syscall(SYS_chdir, birth.cwd), "chdir");
  syscall(SYS_rt_sigprocmask, SIG_SETMASK, standard, nullptr, kMaskBytes);
  require(syscall(SYS_execve, birth.path, birth.argv, birth.env), "execve");
  return 127;
}

// Where `name` is, as execvp would find it in the environment's PATH; itself if nowhere, for execve to complain of.
std::string find_program(const std::string& name, const std::vector<std::string>& env) {
  if (name.find('/') != std::string::npos) return name;
  std::string path = "/bin:/usr/bin";
  for (const auto& variable : env) {
    if (variable.compare(0, 5, "PATH=") == 0) path = variable.substr(5);
  }
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    const std::string folder = path.substr(begin, end - begin);
    const std::string candidate = (folder.empty() ? "." : folder) + "/" + name;
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
    begin = end + 1;
  }
  return name;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (const auto& text : texts) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

void set_nonblocking(const Fd& fd) { fcntl(fd.get(), F_SETFL, fcntl(fd.get(), F_GETFL) | O_NONBLOCK); }

[[noreturn]] void fail(const std::string& call) { throw MachineFault(call + ": " + std::strerror(errno)); }

}  // namespace

Child start_process(const Launch& launch) {
  const std::string path = find_program(launch.argv.front(), launch.env);
  const std::vector<char*> argv = pointers(launch.argv);
  const std::vector<char*> env = pointers(launch.env);
  const auto held = hold_forks();
  Pipe in = make_pipe(), out = make_pipe(), errors = make_pipe();
  // Room for a large answer at once. The user's share of pipe memory may be used up: it works with less.
  fcntl(out.write.get(), F_SETPIPE_SZ, kPipeBytes);
  fcntl(in.write.get(), F_SETPIPE_SZ, kPipeBytes);
  void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("mmap");
  Birth birth{path.c_str(),   argv.data(),     env.data(), launch.cwd.empty() ? nullptr : launch.cwd.c_str(),
              in.read.get(), out.write.get(), errors.write.get(), launch.dies_with_us, getpid()};
  int pidfd = -1;
  // CLONE_VFORK: we go on once the child has called exec or ended.
  const pid_t pid = clone(&be_born, static_cast<char*>(stack) + kStackBytes,
                          CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD, &birth, &pidfd);
  const int error = errno;
  munmap(stack, kStackBytes);
  errno = error;
  if (pid < 0) fail("clone");
  Child child{pid, Fd(pidfd), std::move(in.write), std::move(out.read), std::move(errors.read)};
  if (birth.failed_call) {
    child.reap();
    errno = birth.error;
    fail(birth.failed_call + (" " + (std::strcmp(birth.failed_call, "chdir") ? path : launch.cwd)));
  }
  for (const Fd* fd : {&child.in, &child.out, &child.errors}) set_nonblocking(*fd);
  return child;
}

std::optional<int> Child::reap() {
  siginfo_t info = {};
  int done;
  do {
    done = waitid(static_cast<idtype_t>(3 /* P_PIDFD */), static_cast<id_t>(pidfd.get()), &info, WEXITED);
  } while (done != 0 && errno == EINTR);
  if (done != 0) return std::nullopt;
  return info.si_code == CLD_EXITED ? info.si_status : -info.si_status;
}

}  // namespace fdfast::replio
