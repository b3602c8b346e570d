// Bindings only: arguments into the pool's words, answers into Python objects. What each does is in fdfast/_replio.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/syscall.h>
#include <unistd.h>

#include "pool.hpp"
#include "python_json.hpp"

namespace py = pybind11;
using namespace py::literals;
using namespace fdfast::replio;

namespace {

struct PyAnswer {
  Answer answer;
  py::object parsed;

  std::string_view raw() const { return answer.payload ? answer.payload->raw.view() : std::string_view(); }
  std::string_view errors() const { return answer.payload ? std::string_view(answer.payload->errors) : ""; }
};

py::bytes bytes(std::string_view text) { return py::bytes(text.data(), text.size()); }

// The pool as Python holds it: a child of fork() leaves it as it is, and joining its thread needs no GIL.
class PyPool {
 public:
  explicit PyPool(Settings settings) : pool_(new Pool(std::move(settings))) {}
  ~PyPool() {
    if (pool_->is_foreign()) {
      pool_.release();
      return;
    }
    const py::gil_scoped_release no_gil;
    pool_.reset();
  }
  PyPool(const PyPool&) = delete;
  PyPool& operator=(const PyPool&) = delete;

  Pool& own() const {
    pool_->check_process();
    return *pool_;
  }

 private:
  std::unique_ptr<Pool> pool_;
};

// How long to wait. Python's signals are handled by the main thread, which looks up for them now and then.
Patience patience(const std::optional<double>& timeout_s) {
  Patience patience{timeout_s ? after(Clock::now(), *timeout_s) : Time::max(), std::chrono::hours(24), {}};
  if (syscall(SYS_gettid) != getpid()) return patience;
  patience.slice = std::chrono::milliseconds(50);
  patience.interrupted = [] {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  };
  return patience;
}

// Tries at once, and waits without the GIL only then.
template <typename Try>
std::unique_ptr<PyAnswer> get(const std::optional<double>& timeout_s, const Try& attempt) {
  Answer answer;
  Ledger::Got got = attempt(answer, Patience{Time::min(), {}, {}});
  if (got == Ledger::Got::out_of_patience) {
    const Patience long_patience = patience(timeout_s);
    const py::gil_scoped_release no_gil;
    got = attempt(answer, long_patience);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (got != Ledger::Got::answer) return nullptr;
  return std::unique_ptr<PyAnswer>(new PyAnswer{std::move(answer), {}});
}

std::vector<std::string> commands_of(const py::handle& commands) {
  if (PyBytes_Check(commands.ptr()) || PyUnicode_Check(commands.ptr()) || !PySequence_Check(commands.ptr())) {
    throw py::type_error("submit: commands must be a sequence of bytes, one for each command; got " +
                         std::string(py::str(py::type::handle_of(commands).attr("__name__"))));
  }
  const auto fast = py::reinterpret_steal<py::object>(PySequence_Fast(commands.ptr(), "submit: commands"));
  if (!fast) throw py::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  std::vector<std::string> texts;
  texts.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(fast.ptr(), i);
    if (!PyBytes_Check(item)) {
      throw py::type_error("submit: command " + std::to_string(i) + " must be bytes; got " +
                           std::string(py::str(py::type::handle_of(item).attr("__name__"))) +
                           ". Encode text as UTF-8");
    }
    texts.emplace_back(PyBytes_AS_STRING(item), static_cast<size_t>(PyBytes_GET_SIZE(item)));
  }
  return texts;
}

py::list submit(const PyPool& self, const py::object& commands, const std::string& header,
                std::optional<double> timeout_s, bool unique, bool chain, bool block) {
  Pool& pool = self.own();
  std::vector<std::string> texts = commands_of(commands);
  const size_t count = texts.size();
  TicketId first = 0;
  bool booked;
  {
    const Patience long_patience = patience(block ? std::nullopt : std::optional(0.0));
    const py::gil_scoped_release no_gil;
    booked = pool.submit(std::move(texts), header, timeout_s.value_or(pool.settings().timeout_s), unique,
                         long_patience, first, chain);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!booked) {
    PyErr_SetString(PyExc_BlockingIOError,
                    "submit: queue_bytes of commands and unfetched answers are held; fetch answers, or block");
    throw py::error_already_set();
  }
  py::list tickets(count);
  for (size_t i = 0; i < count; ++i) tickets[i] = first + static_cast<TicketId>(i);
  return tickets;
}

std::unique_ptr<PyAnswer> wait(const PyPool& self, TicketId ticket, std::optional<double> timeout_s) {
  Pool& pool = self.own();
  if (!pool.ledger().was_issued(ticket)) {
    throw InputFault("wait: ticket must be one that submit of this pool has given; got " + std::to_string(ticket));
  }
  return get(timeout_s, [&](Answer& answer, const Patience& p) { return pool.ledger().wait(ticket, answer, p); });
}

Settings settings_of(std::vector<std::string> argv, const std::string& mode,
                     const std::optional<std::map<std::string, std::string>>& env) {
  Settings settings;
  settings.argv = std::move(argv);
  if (mode != "repl" && mode != "once") {
    throw InputFault("Pool: mode must be \"repl\" or \"once\"; got \"" + mode + "\"");
  }
  settings.mode = mode == "repl" ? Mode::repl : Mode::once;
  if (env) {
    for (const auto& [name, value] : *env) settings.env.push_back(name + "=" + value);
  } else {
    for (char** variable = environ; variable && *variable; ++variable) settings.env.emplace_back(*variable);
  }
  return settings;
}

// Our errors as fdfast.errors has them.
void translate(std::exception_ptr thrown) {
  const auto raise = [](const char* name, const std::exception& error) {
    PyErr_SetString(py::module_::import("fdfast.errors").attr(name).ptr(), error.what());
  };
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const InputFault& fault) {
    raise("InputError", fault);
  } catch (const MachineFault& fault) {
    raise("MachineError", fault);
  }
}

py::dict stats(const PyPool& self) {
  const Counts counts = self.own().counts();
  py::dict result;
  for (const auto& [name, value] : named(counts)) result[name] = value;
  return result;
}

void bind_answer(py::module_& m) {
  static PyObject* end_names[kEndNames.size()];  // for the life of the process
  for (size_t i = 0; i < kEndNames.size(); ++i) end_names[i] = PyUnicode_InternFromString(kEndNames[i]);
  py::class_<PyAnswer>(m, "Answer", py::buffer_protocol())
      .def_property_readonly("ticket", [](const PyAnswer& self) { return self.answer.ticket; })
      .def_property_readonly("end",
                             [](const PyAnswer& self) {
                               return py::reinterpret_borrow<py::str>(end_names[static_cast<size_t>(self.answer.end)]);
                             })
      .def_property_readonly("status", [](const PyAnswer& self) { return self.answer.status; })
      .def_property_readonly("seconds", [](const PyAnswer& self) { return self.answer.seconds; })
      .def_property_readonly("queued_s", [](const PyAnswer& self) { return self.answer.queued_s; })
      .def_property_readonly("pid", [](const PyAnswer& self) { return self.answer.pid; })
      .def_property_readonly("shared", [](const PyAnswer& self) { return self.answer.shared; })
      .def_property_readonly("raw", [](const PyAnswer& self) { return bytes(self.raw()); })
      .def_property_readonly("stderr", [](const PyAnswer& self) { return bytes(self.errors()); })
      .def("json",
           [](PyAnswer& self) {
             if (!self.parsed) self.parsed = python_json(self.raw());
             return self.parsed;
           })
      .def("__len__", [](const PyAnswer& self) { return self.raw().size(); })
      .def("__repr__",
           [](const PyAnswer& self) {
             return "<Answer " + std::to_string(self.answer.ticket) + ": " +
                    kEndNames[static_cast<size_t>(self.answer.end)] + ", " + std::to_string(self.raw().size()) +
                    " bytes, " + std::to_string(self.answer.seconds) + " s>";
           })
      .def_buffer([](const PyAnswer& self) {
        const std::string_view raw = self.raw();
        return py::buffer_info(reinterpret_cast<const uint8_t*>(raw.empty() ? "" : raw.data()),
                               static_cast<py::ssize_t>(raw.size()), true);
      });
}

void bind_pool(py::module_& m) {
  py::class_<PyPool>(m, "Pool")
      .def(py::init([](std::vector<std::string> argv, const std::string& mode, int workers,
                       const std::optional<std::map<std::string, std::string>>& env, std::string cwd, double timeout_s,
                       double start_timeout_s, std::string ready, int64_t memory_bytes, int64_t recycle_bytes,
                       int64_t recycle_after, double poll_s, int64_t answer_bytes, int64_t stderr_bytes,
                       int64_t queue_bytes, int depth, int64_t cache_bytes, std::string probe, int max_restarts) {
             Settings settings = settings_of(std::move(argv), mode, env);
             settings.workers = workers;
             settings.cwd = std::move(cwd);
             settings.timeout_s = timeout_s;
             settings.start_timeout_s = start_timeout_s;
             settings.ready = std::move(ready);
             settings.memory_bytes = memory_bytes;
             settings.recycle_bytes = recycle_bytes;
             settings.recycle_after = recycle_after;
             settings.poll_s = poll_s;
             settings.answer_bytes = answer_bytes;
             settings.stderr_bytes = stderr_bytes;
             settings.queue_bytes = queue_bytes;
             settings.depth = depth;
             settings.cache_bytes = cache_bytes;
             settings.probe = std::move(probe);
             settings.max_restarts = max_restarts;
             return std::make_unique<PyPool>(std::move(settings));
           }),
           "argv"_a, py::kw_only(), "mode"_a = "repl", "workers"_a = 1, "env"_a = py::none(), "cwd"_a = "",
           "timeout_s"_a = 60.0, "start_timeout_s"_a = 120.0, "ready"_a = py::bytes(), "memory_bytes"_a = 0,
           "recycle_bytes"_a = 0, "recycle_after"_a = 0, "poll_s"_a = 0.02, "answer_bytes"_a = int64_t{256} << 20,
           "stderr_bytes"_a = 64 << 10, "queue_bytes"_a = int64_t{256} << 20, "depth"_a = 1, "cache_bytes"_a = 0,
           "probe"_a = py::bytes(), "max_restarts"_a = 5)
      .def("submit", &submit, "commands"_a, py::kw_only(), "header"_a = py::bytes(), "timeout_s"_a = py::none(),
           "unique"_a = false, "chain"_a = false, "block"_a = true)
      .def(
          "next",
          [](const PyPool& self, std::optional<double> timeout_s) {
            Pool& pool = self.own();
            return get(timeout_s, [&](Answer& answer, const Patience& p) { return pool.ledger().next(answer, p); });
          },
          "timeout_s"_a = py::none())
      .def("wait", &wait, "ticket"_a, "timeout_s"_a = py::none())
      .def("ready",
           [](const PyPool& self) {
             py::list answers;
             for (Answer& answer : self.own().ledger().ready()) {
               answers.append(py::cast(std::unique_ptr<PyAnswer>(new PyAnswer{std::move(answer), {}})));
             }
             return answers;
           })
      .def("fileno", [](const PyPool& self) { return self.own().ledger().ready_fd(); })
      .def("cancel",
           [](const PyPool& self, const std::vector<TicketId>& tickets) { return self.own().ledger().cancel(tickets); },
           "tickets"_a)
      .def("stats", &stats)
      .def("pids", [](const PyPool& self) { return self.own().ledger().pids(); })
      .def("close",
           [](const PyPool& self) {
             Pool& pool = self.own();
             const py::gil_scoped_release no_gil;
             pool.close();
           })
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](const py::object& self, const py::args&) { self.attr("close")(); });
}

}  // namespace

PYBIND11_MODULE(_replio, m) {
  m.doc() = "A pool of worker processes behind one epoll loop: see fdfast/_replio.pyi";
  py::register_exception_translator(&translate);
  bind_answer(m);
  bind_pool(m);
}
