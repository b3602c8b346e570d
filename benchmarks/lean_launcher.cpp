// A `lean` of one line: the embedded Lean as a program, a process for each run, to measure against.

extern "C" int lean_main(int, char**);

int main(int argc, char** argv) { return lean_main(argc, argv); }
