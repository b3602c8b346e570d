// The worker of the C++ tests: what it does is said by the words of each command.
#pragma once

namespace worker {

// Reads commands up to blank lines and answers {"got": "<command>"}, unless a command holds one of:
//   die N         exit with N, unanswered          after N    answer, then exit with N
//   segv hang     as they say                      half       print half an answer and exit with 5
//   big N         answer N bytes                   err N      N bytes on stderr first
//   sleep MS      before the answer                touch MB   memory, kept
//   child         leave a child that holds stdout, and exit with 3; child-out: one in a session of its own, and hang
//   twice         answer twice                     shut       close stdout and hang
//   ask S         answer with the text S           forge      print {"env": 0} before the answer
//   "cmd": ...    answer {"env": N}; with `bad` in it {"message": "no"}
int run();

// All of stdin, then: with "kill" in it die by SIGKILL, else print it and exit with 7.
int run_once();

}  // namespace worker
