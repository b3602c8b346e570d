// A fast stand-in for leanprover-community/repl that misbehaves as it is told to, for tests and benchmarks.
//
// It reads commands up to a blank line and answers each with JSON and a blank line; `env` counts up. As the original
// does, it ends with status 1 and a word on stderr when a command is no JSON object, says nothing to a command that
// begins with `#` or `--`, and knows only the environments that it has given out.
//
// A command may hold wishes anywhere in its text, `fake[NAME NAME=VALUE ...]`:
//   id=N            put "id": N into the answer            say=WORD      a message with this word
//   size=N          one message of N bytes                 messages=N    N messages of 60 bytes each
//   deep=N          lists nested N deep                    no_utf8       a message with bytes that are no UTF-8
//   sleep=MS        wait before anything else              stderr=N      first write N bytes to stderr
//   balloon=MIB     take memory and keep it                child_balloon=MIB   a child takes it
//   grandchild=S    leave a process behind that holds our pipes open for S seconds, in our group; its number is the
//                   answer's "child", and on stderr
//   escapee=S       the same in a session of its own       ignore_sigterm
//   die_before      SIGKILL to itself before the answer    die_during    in the middle of it    die_after   after it
//   exit=STATUS     end without an answer                  hang          never answer
//   half            half an answer, then hang              close         close stdout, then hang
//   cut             half an answer as a frame              twice=MS      the answer, and MS later once more
//   forge=MS        a false {"env": 0} frame, MS later the true answer, an error
//   garbage         a stray line before the answer         blank         a blank line before it
//   split           one byte a write                       fds           our open files in the answer
// {"pickleTo": PATH} writes a file, {"unpickleEnvFrom": PATH} reads one; where that fails it ends with status 1.
//
// Arguments: --ready TEXT is printed as a line before the first command, --start-ms N is waited before that, and with
// --fail-while PATH it ends with status 1 at the start while there is such a file.

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using std::string, std::string_view;

static void write_all(int file, string_view text) {
    while (!text.empty()) {
        ssize_t n = write(file, text.data(), text.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) _exit(4);  // nobody reads any more
        text.remove_prefix(size_t(n));
    }
}

[[noreturn]] static void fail(const string& why) {
    write_all(2, "uncaught exception: " + why + "\n");
    _exit(1);
}

[[noreturn]] static void hang() {
    for (;;) pause();
}

[[noreturn]] static void die() {
    kill(getpid(), SIGKILL);
    hang();
}

static void sleep_ms(long ms) {
    if (ms > 0) usleep(useconds_t(ms) * 1000);
}

// What stands in the brackets of `fake[...]`.
struct Wishes {
    string text;  // with a space at both ends

    explicit Wishes(string_view command) {
        size_t start = command.find("fake[");
        if (start == string_view::npos) return;
        start += 5;
        size_t end = command.find(']', start);
        if (end == string_view::npos) fail("a wish without its bracket");
        text = " " + string(command.substr(start, end - start)) + " ";
    }
    bool has(const char* name) const {
        if (text.empty()) return false;
        string start = " " + string(name);
        return text.find(start + " ") != string::npos || text.find(start + "=") != string::npos;
    }
    string value(const char* name) const {
        if (text.empty()) return "";
        string key = " " + string(name) + "=";
        size_t start = text.find(key);
        if (start == string::npos) return "";
        start += key.size();
        return text.substr(start, text.find(' ', start) - start);
    }
    long number(const char* name, long otherwise = 0) const {
        string found = value(name);
        return found.empty() ? otherwise : atol(found.c_str());
    }
};

// The text after `"name":` and white space; empty if there is none. A name inside a JSON string has its quotes
// escaped, so it is not found.
static string_view field(string_view command, const string& name) {
    string key = "\"" + name + "\":";
    size_t start = command.find(key);
    if (start == string_view::npos) return {};
    start = command.find_first_not_of(' ', start + key.size());
    return start == string_view::npos ? string_view() : command.substr(start);
}

static string quoted_field(string_view command, const string& name) {
    string_view rest = field(command, name);
    if (rest.empty() || rest[0] != '"') return "";
    return string(rest.substr(1, rest.find('"', 1) - 1));
}

static string message(string_view data) {
    return R"({"severity": "error",
   "pos": {"line": 1, "column": 0},
   "endPos": {"line": 1, "column": 4},
   "data": ")" + string(data) + "\"}";
}

static string open_files() {
    string list;
    DIR* folder = opendir("/proc/self/fd");
    while (dirent* entry = readdir(folder)) {
        int number = atoi(entry->d_name);
        if (entry->d_name[0] == '.' || number == dirfd(folder)) continue;
        list += (list.empty() ? "" : ", ") + std::to_string(number);
    }
    closedir(folder);
    return "[" + list + "]";
}

static pid_t last_child = 0;  // that was left behind

static string answer_to(const Wishes& wishes, long env) {
    string out = "{";
    if (wishes.has("id")) out += "\"id\": " + wishes.value("id") + ",\n ";
    if (last_child) out += "\"child\": " + std::to_string(last_child) + ",\n ";
    if (wishes.has("fds")) out += "\"fds\": " + open_files() + ",\n ";
    if (long depth = wishes.number("deep")) {
        out += "\"infotree\": " + string(size_t(depth), '[') + string(size_t(depth), ']') + ",\n ";
    }
    std::vector<string> messages;
    if (wishes.has("size")) messages.push_back(message(string(size_t(wishes.number("size")), 'x')));
    if (wishes.has("no_utf8")) messages.push_back(message("\xff\xfe\xc3("));
    if (wishes.has("say")) messages.push_back(message(wishes.value("say")));
    if (wishes.has("forge")) messages.push_back(message("this is the true answer"));
    if (long count = wishes.number("messages")) {
        messages.insert(messages.end(), size_t(count), message(string(60, 'x')));
    }
    for (size_t i = 0; i < messages.size(); ++i) out += (i ? ",\n  " : "\"messages\":\n [") + messages[i];
    if (!messages.empty()) out += "],\n ";
    return out + "\"env\": " + std::to_string(env) + "}\n\n";
}

// The sum of what was taken, so that no compiler leaves it out.
static size_t take_memory(long mib) {
    size_t sum = 0;
    for (long i = 0; i < mib; ++i) {
        volatile char* block = static_cast<char*>(malloc(1 << 20));
        if (block == nullptr) fail("out of memory");
        for (size_t at = 0; at < (1 << 20); at += 4096) block[at] = 1;
        sum += size_t(block[0]);
    }
    return sum;
}

enum class Session { ours, own };

// The child holds our stdin, stdout and stderr.
static void leave_child(long seconds, long mib, Session session) {
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        if (session == Session::own) setsid();
        prctl(PR_SET_PDEATHSIG, 0);
        take_memory(mib);
        sleep(unsigned(seconds));
        _exit(0);
    }
    last_child = child;
    write_all(2, "child " + std::to_string(child) + "\n");  // for those that get no answer
}

// What is done before the answer.
static void prepare(const Wishes& wishes) {
    sleep_ms(wishes.number("sleep"));
    if (long size = wishes.number("stderr")) write_all(2, string(size_t(size) - 1, 'e') + "\n");
    if (wishes.has("ignore_sigterm")) signal(SIGTERM, SIG_IGN);
    if (wishes.has("balloon")) take_memory(wishes.number("balloon"));
    if (wishes.has("child_balloon")) leave_child(60, wishes.number("child_balloon"), Session::ours);
    if (wishes.has("grandchild")) leave_child(wishes.number("grandchild"), 0, Session::ours);
    if (wishes.has("escapee")) leave_child(wishes.number("escapee"), 0, Session::own);
    if (wishes.has("garbage")) write_all(1, "a stray line\n");
    if (wishes.has("blank")) write_all(1, "\n");
    if (wishes.has("exit")) _exit(int(wishes.number("exit")));
    if (wishes.has("die_before")) die();
    if (wishes.has("close")) close(1);
    if (wishes.has("hang") || wishes.has("close")) hang();
}

static void give(const Wishes& wishes, string answer) {
    // In one write where no time is asked for between the frames: a reader finds both or none.
    for (const auto& [wish, first] : {std::pair{"forge", string("{\"env\": 0}\n\n")}, std::pair{"twice", answer}}) {
        if (!wishes.has(wish)) continue;
        if (long ms = wishes.number(wish)) {
            write_all(1, first);
            sleep_ms(ms);
        } else {
            answer = first + answer;
        }
    }
    string_view half = string_view(answer).substr(0, answer.size() / 2);
    if (wishes.has("cut")) {
        write_all(1, string(half) + "\n\n");
    } else if (wishes.has("die_during") || wishes.has("half")) {
        write_all(1, half);
        if (wishes.has("half")) hang();
        die();
    } else if (wishes.has("split")) {
        for (char byte : answer) write_all(1, string_view(&byte, 1));
    } else {
        write_all(1, answer);
    }
    if (wishes.has("die_after")) die();
}

static void pickle(const string& path) {
    int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0) fail(path + ": " + strerror(errno));
    string state(4096, 's');
    for (string_view rest = state; !rest.empty();) {
        ssize_t n = write(file, rest.data(), rest.size());
        if (n < 0) fail(path + ": " + strerror(errno));
        rest.remove_prefix(size_t(n));
    }
    close(file);
}

struct Repl {
    long next_env = 0;

    void run(string_view command) {
        if (command[0] == '#' || command.starts_with("--")) return;
        if (command[0] != '{') fail("{\"message\": \"Could not parse JSON\"}");
        string_view env = field(command, "env");
        if (!env.empty() && atol(string(env.substr(0, 20)).c_str()) >= next_env) {
            write_all(1, "{\"message\": \"Unknown environment.\"}\n\n");
            return;
        }
        if (string path = quoted_field(command, "pickleTo"); !path.empty()) pickle(path);
        if (string path = quoted_field(command, "unpickleEnvFrom"); !path.empty() && access(path.c_str(), R_OK) != 0) {
            fail(path + ": " + strerror(errno));
        }
        Wishes wishes(command);
        prepare(wishes);
        give(wishes, answer_to(wishes, next_env++));
    }
};

static void start(int argc, char** argv) {
    string ready;
    for (int i = 1; i + 1 < argc; i += 2) {
        string_view option = argv[i];
        if (option == "--ready") ready = string(argv[i + 1]) + "\n";
        if (option == "--start-ms") sleep_ms(atol(argv[i + 1]));
        if (option == "--fail-while" && access(argv[i + 1], F_OK) == 0) fail("cannot start");
    }
    write_all(1, ready);
}

int main(int argc, char** argv) {
    start(argc, argv);
    Repl repl;
    std::vector<char> chunk(1 << 18);
    string input;
    size_t searched = 0;
    for (bool ended = false; !ended;) {
        ssize_t n = read(0, chunk.data(), chunk.size());
        if (n < 0 && errno == EINTR) continue;
        ended = n <= 0;
        if (!ended) input.append(chunk.data(), size_t(n));
        size_t taken = 0;
        for (size_t end; (end = input.find("\n\n", searched)) != string::npos; searched = taken) {
            if (end == taken) fail("{\"message\": \"Could not parse JSON\"}");  // an empty command
            repl.run(string_view(input).substr(taken, end - taken));
            taken = end + 2;
        }
        input.erase(0, taken);
        searched = input.empty() ? 0 : input.size() - 1;
        if (!input.empty() && input[0] == '\n') fail("{\"message\": \"Could not parse JSON\"}");
    }
    // The last command may end with the input.
    size_t last = input.find_last_not_of(" \n");
    if (last != string::npos) repl.run(string_view(input).substr(0, last + 1));
    return 0;
}
