// The answers that are kept; see command.hpp.
#include "command.hpp"

namespace fdfast::replio {

AnswerCache::Kept::Kept(std::string command, const CommandKey& of, Answer given)
    : text(std::move(command)), key(of), answer(std::move(given)) {
  key.text = text;
  bytes = static_cast<int64_t>(text.size() + answer.payload->raw.size() + answer.payload->errors.size());
}

const Answer* AnswerCache::find(const CommandKey& key) {
  const auto found = places_.find(key);
  if (found == places_.end()) return nullptr;
  kept_.splice(kept_.begin(), kept_, found->second);
  return &found->second->answer;
}

void AnswerCache::keep(Command& command, const Answer& answer) {
  if (capacity_ == 0 || places_.contains(command.key)) return;
  kept_.emplace_front(std::move(command.text), command.key, answer);
  places_.emplace(kept_.front().key, kept_.begin());
  bytes_ += kept_.front().bytes;
  while (bytes_ > capacity_) drop_oldest();
}

void AnswerCache::drop_idle_headers() {
  for (auto kept = kept_.begin(); kept != kept_.end();) {
    const auto here = kept++;
    if (here->key.header->id == 0 || here->key.header->commands > 0) continue;
    bytes_ -= here->bytes;
    places_.erase(here->key);
    kept_.erase(here);
  }
}

void AnswerCache::drop_oldest() {
  bytes_ -= kept_.back().bytes;
  places_.erase(kept_.back().key);
  kept_.pop_back();
}

}  // namespace fdfast::replio
