// The least that a driver of REPLs has to do: one epoll loop that writes ready-made frames and looks for blank lines.
//
//   replio_limit REPL FRAMES WORKERS ANSWERS
//
// FRAMES is a file of commands as they go over the wire, each with its blank line; the first goes to every worker
// before the clock starts. Each worker has one command at a time. ANSWERS is a file for the raw answers in the order
// of the commands, or "" for none. Prints one JSON object: wall_s, cpu_s (of this process, not of the workers),
// bytes read, and latencies_s from the write of a command to the end of its answer.
// Nothing is parsed, no deadline is kept, no fault is seen: what a pool does beyond that is its overhead.

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

using std::string, std::string_view;

static double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

static double cpu_s() {
    rusage used;
    getrusage(RUSAGE_SELF, &used);
    auto seconds = [](timeval t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    return seconds(used.ru_utime) + seconds(used.ru_stime);
}

static void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "replio_limit: %s: %s\n", what, strerror(errno));
    exit(1);
}

struct Worker {
    pid_t pid = 0;
    int in = -1, out = -1;
    string_view unsent;  // of the command that runs
    bool waits_to_write = false;
    string answer;
    size_t searched = 0;
    size_t command = 0;
    double began_s = 0;
};

static Worker start(const char* repl) {
    int in[2], out[2];
    require(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0, "pipe");
    Worker worker;
    worker.pid = vfork();
    if (worker.pid == 0) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execl(repl, repl, static_cast<char*>(nullptr));
        _exit(127);
    }
    require(worker.pid > 0, "vfork");
    close(in[0]);
    close(out[1]);
    worker.in = in[1];
    worker.out = out[0];
    return worker;
}

struct Loop {
    std::vector<string_view> frames;
    std::vector<Worker> workers;
    bool keep = false;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    size_t next = 0, done = 0, bytes = 0;
    std::vector<double> latencies;
    std::vector<string> answers;
    std::vector<char> buffer = std::vector<char>(1 << 20);

    void watch(int operation, int file, uint32_t events, size_t number) {
        epoll_event event{};
        event.events = events;
        event.data.u64 = number;
        require(epoll_ctl(epoll, operation, file, &event) == 0, "epoll_ctl");
    }

    void send(size_t number) {
        Worker& worker = workers[number];
        while (!worker.unsent.empty()) {
            ssize_t n = write(worker.in, worker.unsent.data(), worker.unsent.size());
            if (n < 0) {
                require(errno == EAGAIN, "write");
                if (!worker.waits_to_write) watch(EPOLL_CTL_ADD, worker.in, EPOLLOUT, 2 * number + 1);
                worker.waits_to_write = true;
                return;
            }
            worker.unsent.remove_prefix(size_t(n));
        }
        if (worker.waits_to_write) watch(EPOLL_CTL_DEL, worker.in, 0, 0);
        worker.waits_to_write = false;
    }

    void feed(size_t number) {
        if (next == frames.size()) return;
        Worker& worker = workers[number];
        worker.command = next++;
        worker.unsent = frames[worker.command];
        worker.began_s = now_s();
        send(number);
    }

    // Whether an answer is whole.
    bool receive(size_t number) {
        Worker& worker = workers[number];
        ssize_t n = read(worker.out, buffer.data(), buffer.size());
        if (n < 0 && errno == EAGAIN) return false;
        require(n > 0, "read");
        bytes += size_t(n);
        worker.answer.append(buffer.data(), size_t(n));
        size_t end = worker.answer.find("\n\n", worker.searched);
        worker.searched = worker.answer.size() - 1;
        if (end == string::npos) return false;
        require(end + 2 == worker.answer.size(), "more than one answer");
        return true;
    }

    void finish(size_t number) {
        Worker& worker = workers[number];
        latencies[worker.command] = now_s() - worker.began_s;
        if (keep) answers[worker.command] = worker.answer;
        worker.answer.clear();
        worker.searched = 0;
        ++done;
        feed(number);
    }

    void run() {
        latencies.resize(frames.size());
        answers.resize(frames.size());
        for (size_t i = 0; i < workers.size(); ++i) feed(i);
        epoll_event events[64];
        while (done < frames.size()) {
            int count = epoll_wait(epoll, events, 64, -1);
            require(count >= 0 || errno == EINTR, "epoll_wait");
            for (int i = 0; i < count; ++i) {
                size_t number = events[i].data.u64 / 2;
                if (events[i].data.u64 % 2) send(number);
                else if (receive(number)) finish(number);
            }
        }
    }
};

static std::vector<string_view> split(string_view text) {
    std::vector<string_view> frames;
    for (size_t end; (end = text.find("\n\n")) != string_view::npos; text.remove_prefix(end + 2)) {
        frames.push_back(text.substr(0, end + 2));
    }
    return frames;
}

static void open_header(Worker& worker, string_view header) {
    require(write(worker.in, header.data(), header.size()) == ssize_t(header.size()), "header");
    string answer;
    for (char part[256]; !answer.ends_with("\n\n");) {
        ssize_t n = read(worker.out, part, sizeof part);
        require(n > 0, "header");
        answer.append(part, size_t(n));
    }
    fcntl(worker.in, F_SETFL, O_NONBLOCK);
    fcntl(worker.out, F_SETFL, O_NONBLOCK);
}

int main(int argc, char** argv) {
    require(argc == 5, "arguments: REPL FRAMES WORKERS ANSWERS");
    std::ifstream file(argv[2], std::ios::binary);
    string text{std::istreambuf_iterator<char>(file), {}};
    Loop loop;
    loop.frames = split(text);
    require(loop.frames.size() > 1, "FRAMES has no command");
    string_view header = loop.frames.front();
    loop.frames.erase(loop.frames.begin());
    loop.keep = argv[4][0] != '\0';
    for (int i = 0; i < atoi(argv[3]); ++i) {
        loop.workers.push_back(start(argv[1]));
        open_header(loop.workers.back(), header);
        loop.watch(EPOLL_CTL_ADD, loop.workers.back().out, EPOLLIN, 2 * size_t(i));
    }
    double cpu = cpu_s(), wall = now_s();
    loop.run();
    wall = now_s() - wall;
    cpu = cpu_s() - cpu;
    for (Worker& worker : loop.workers) {
        close(worker.in);
        waitpid(worker.pid, nullptr, 0);
    }
    if (loop.keep) {
        std::ofstream answers(argv[4], std::ios::binary);
        for (const string& answer : loop.answers) answers << answer;
    }
    printf("{\"wall_s\": %.9f, \"cpu_s\": %.6f, \"bytes\": %zu, \"latencies_s\": [", wall, cpu, loop.bytes);
    for (size_t i = 0; i < loop.latencies.size(); ++i) printf("%s%.9f", i ? ", " : "", loop.latencies[i]);
    printf("]}\n");
}
