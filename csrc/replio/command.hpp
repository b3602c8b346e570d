// A command in the books, the header it is run under, and the answers that are kept for the next who asks.
#pragma once

#include <functional>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "list.hpp"
#include "types.hpp"

namespace fdfast::replio {

struct Header;

// Commands with equal keys have one answer. `hash` is computed once: a command may be long.
struct CommandKey {
  size_t hash;
  const Header* header;
  double timeout_s;
  std::string_view text;

  CommandKey(const Header* under, double timeout, std::string_view command)
      : hash(std::hash<std::string_view>{}(command)), header(under), timeout_s(timeout), text(command) {}
  bool operator==(const CommandKey& other) const {
    return hash == other.hash && header == other.header && timeout_s == other.timeout_s && text == other.text;
  }
};
struct CommandKeyHash {
  size_t operator()(const CommandKey& key) const { return key.hash; }
};

struct Command {
  std::string text;
  CommandKey key;  // looks into `text`
  Header* header;
  bool unique;
  bool running = false;
  bool pending = false;     // in a chain, and its turn has not come: it is in no queue
  bool follows = false;     // in a chain, and not its first: no other worker can run it
  Command* then = nullptr;  // what the chain has after it
  std::vector<TicketId> tickets;  // the first one's answer is not `shared`
  Link<Command> in_all, in_header;

  Command(std::string command, Header* under, double timeout_s, bool alone)
      : text(std::move(command)), key(under, timeout_s, text), header(under), unique(alone) {}
  Command(const Command&) = delete;
  Command& operator=(const Command&) = delete;
};

struct Header {
  uint64_t id;  // 0: no header
  std::string text;
  List<Command, &Command::in_header> queue;
  size_t place = 0;  // among the headers that have commands waiting
  int64_t commands = 0;  // queued and running
};

// The last answers, at most so many bytes of them with their commands.
class AnswerCache {
 public:
  explicit AnswerCache(int64_t capacity) : capacity_(capacity) {}
  const Answer* find(const CommandKey& key);
  // Takes the command's text; its key is void then.
  void keep(Command& command, const Answer& answer);
  void drop_idle_headers();  // all answers under headers that no command names

 private:
  struct Kept {
    std::string text;
    CommandKey key;
    Answer answer;
    int64_t bytes;
    Kept(std::string command, const CommandKey& of, Answer given);
  };
  void drop_oldest();

  int64_t capacity_;
  int64_t bytes_ = 0;
  std::list<Kept> kept_;  // the one used last is first
  std::unordered_map<CommandKey, std::list<Kept>::iterator, CommandKeyHash> places_;
};

}  // namespace fdfast::replio
