// Python module roro_fast._host: host structures of the scheduler. No torch headers here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "host/batcher.h"
#include "host/catch_up.h"
#include "host/page_pool.h"
#include "host/prefix_hash.h"

namespace py = pybind11;

namespace {

std::uint64_t key_of(const py::int_& value) {
  const std::uint64_t key = PyLong_AsUnsignedLongLongMask(value.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return key;
}

bool is_int64(const py::buffer_info& info) {
  const bool native = info.format == "q" || info.format == "l";
  return native && info.itemsize == 8 && info.ndim == 1 && info.strides[0] == 8;
}

std::vector<std::int64_t> copy_sequence(const py::sequence& sequence) {
  const py::object fast = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "tokens: not a sequence"));
  if (!fast) throw py::error_already_set();
  std::vector<std::int64_t> tokens(PySequence_Fast_GET_SIZE(fast.ptr()));
  PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = PyLong_AsLongLong(items[i]);
    if (tokens[i] == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error("tokens: expected a list of int or a contiguous 1-D int64 buffer");
    }
  }
  return tokens;
}

template <typename F>
auto with_tokens(const py::object& tokens, F&& body) {
  if (PyObject_CheckBuffer(tokens.ptr())) {
    const py::buffer_info info = py::reinterpret_borrow<py::buffer>(tokens).request();
    if (!is_int64(info)) throw py::type_error("tokens: expected a list of int or a contiguous 1-D int64 buffer");
    return body(static_cast<const std::int64_t*>(info.ptr), static_cast<std::int64_t>(info.size));
  }
  if (!PyList_Check(tokens.ptr()) && !PyTuple_Check(tokens.ptr())) {
    throw py::type_error("tokens: expected a list of int or a contiguous 1-D int64 buffer");
  }
  const std::vector<std::int64_t> copy = copy_sequence(py::reinterpret_borrow<py::sequence>(tokens));
  return body(copy.data(), static_cast<std::int64_t>(copy.size()));
}

using Int64s = py::array_t<std::int64_t, 0>;

// Rows may lie apart, their elements must not: the array is read in place, never copied.
const std::int64_t* int64s(const char* name, const py::array& a, int ndim, std::int64_t n = -1) {
  const py::ssize_t size = ndim && a.ndim() == ndim ? a.shape(0) : 0;
  if (!py::isinstance<Int64s>(a) || a.ndim() != ndim || (a.shape(ndim - 1) > 1 && a.strides(ndim - 1) != 8)) {
    throw py::value_error(std::string(name) + ": expected int64 with " + std::to_string(ndim) +
                          " dimension(s), elements of the last one side by side");
  }
  if (n >= 0 && size != n) {
    throw py::value_error(std::string(name) + ": " + std::to_string(size) + " entries, but rows has " +
                          std::to_string(n));
  }
  return static_cast<const std::int64_t*>(a.data());
}

py::tuple plan(const py::array& tokens, const py::array& rows, const py::array& start, const py::array& count,
               const py::array& table, std::int64_t page_size) {
  roro::CatchUp c{};
  c.tokens = int64s("tokens", tokens, 2);
  c.sequences = tokens.shape(0);
  c.length = tokens.shape(1);
  c.token_stride = tokens.strides(0) / 8;
  c.table = int64s("page_table", table, 2);
  if (table.shape(0) != c.sequences) throw py::value_error("page_table: as many rows as tokens are needed");
  c.table_width = table.shape(1);
  c.table_stride = table.strides(0) / 8;
  c.page_size = page_size;
  c.rows = int64s("rows", rows, 1);
  c.n = rows.shape(0);
  c.start = int64s("start", start, 1, c.n);
  c.count = int64s("count", count, 1, c.n);
  Int64s cu(c.n + 1);
  const std::int64_t total = roro::measure_catch_up(c, cu.mutable_data());
  Int64s ids(total), positions(total), slots(total);
  roro::plan_catch_up(c, ids.mutable_data(), positions.mutable_data(), slots.mutable_data());
  return py::make_tuple(ids, positions, slots, cu);
}

// Arrays by name, kept alive and used in place: dtype and layout must be what C++ takes them for.
class Arrays {
 public:
  explicit Arrays(const py::dict& all) : all_(all) {}

  template <typename T>
  T* get(const char* name, std::int64_t size) const {
    if (!all_.contains(name)) throw py::value_error(std::string(name) + ": missing");
    return at<T>(name, all_[name], size);
  }

  template <typename T>
  static T* at(const char* name, const py::handle& value, std::int64_t size) {
    const bool right = py::isinstance<py::array_t<T, py::array::c_style>>(value);
    if (!right || py::reinterpret_borrow<py::array>(value).size() != size) {
      throw py::value_error(std::string(name) + ": expected a contiguous array of another type or size");
    }
    return static_cast<T*>(const_cast<void*>(py::reinterpret_borrow<py::array>(value).data()));
  }

 private:
  const py::dict& all_;
};

template <typename T>
const T* vector_of(const char* name, const py::array& a, std::int64_t n) {
  return Arrays::at<T>(name, a, n);
}

class BatcherHolder {
 public:
  BatcherHolder(const py::dict& arrays, const py::dict& sizes, const py::list& pools, const py::list& delimiters,
                const py::list& eos)
      : kept_(py::make_tuple(arrays, pools, delimiters, eos)),
        batcher_(state(arrays, sizes), stage(arrays, sizes), pools_of(pools), ends(delimiters, eos)) {}

  py::tuple census() const {
    const roro::Census c = batcher_.census();
    return py::make_tuple(c.paused, c.free, py::array_t<std::int64_t>(c.ready.size(), c.ready.data()));
  }

  py::object schedule(std::int64_t part) {
    return batcher_.schedule(part) ? py::object(tuple_of(batcher_.lay_out(part))) : py::none();
  }

  py::tuple lay_out(std::int64_t part, const py::array& rows, const py::array& start, const py::array& count) {
    const std::int64_t n = rows.size();
    return tuple_of(batcher_.lay_out(part, vector_of<std::int64_t>("rows", rows, n),
                                     vector_of<std::int64_t>("start", start, n),
                                     vector_of<std::int64_t>("count", count, n), n));
  }

  bool plain(std::int64_t model, const py::array& rows, const py::array& finite) const {
    const std::int64_t n = rows.size();
    return batcher_.plain(model, vector_of<std::int64_t>("rows", rows, n), vector_of<bool>("finite", finite, n), n);
  }

  py::list append(std::int64_t model, const py::array& rows, const py::array& token, const py::array& logprob,
                  const py::array& entropy) {
    const std::int64_t n = rows.size();
    py::list out;
    for (const roro::StepEnd& e : batcher_.append(
             model, vector_of<std::int64_t>("rows", rows, n), vector_of<std::int64_t>("token", token, n),
             vector_of<float>("logprob", logprob, n), vector_of<float>("entropy", entropy, n), n)) {
      out.append(py::make_tuple(e.slot, e.closed, e.ended, e.full));
    }
    return out;
  }

  py::tuple boundary(const py::array& rows, bool drafts) const {
    const py::ssize_t n = rows.size();
    py::array_t<std::int64_t> ints({py::ssize_t{3}, n});
    py::array_t<float> floats({py::ssize_t{9}, n});
    batcher_.boundary(vector_of<std::int64_t>("rows", rows, n), n, drafts, ints.mutable_data(), floats.mutable_data());
    return py::make_tuple(ints, floats);
  }

 private:
  static std::int64_t size(const py::dict& sizes, const char* name) { return sizes[name].cast<std::int64_t>(); }

  static py::tuple tuple_of(const roro::BatchSizes& b) {
    return py::make_tuple(b.rows, b.tokens, b.wanted, b.pages, b.truncated, b.alike);
  }

  static roro::EngineState state(const py::dict& arrays, const py::dict& sizes) {
    const Arrays a(arrays);
    roro::EngineState s{};
    const std::int64_t n = s.num_slots = size(sizes, "num_slots");
    s.max_len = size(sizes, "max_len");
    s.num_models = size(sizes, "num_models");
    s.num_parts = size(sizes, "num_parts");
    s.table_width = size(sizes, "table_width");
    s.page_size = size(sizes, "page_size");
    s.trunk = size(sizes, "trunk");
    const std::int64_t k = s.num_models + 1, parts = s.num_parts * n;
    if (s.page_size < 1 || s.num_parts > k || s.trunk >= s.num_parts) throw py::value_error("sizes: do not fit");
    s.tokens = a.get<std::int64_t>("tokens", n * s.max_len);
    for (auto [name, field] : {std::pair{"length", &s.length}, {"max_total", &s.max_total},
                               {"max_step_tokens", &s.max_step_tokens}, {"writer", &s.writer}, {"arrival", &s.arrival},
                               {"rewrites", &s.rewrites}, {"top_k", &s.top_k}, {"step_start", &s.step_start},
                               {"matched", &s.matched}, {"last_tokens", &s.last_tokens},
                               {"last_model", &s.last_model}, {"step_index", &s.step_index}, {"draws", &s.draws}}) {
      *field = a.get<std::int64_t>(name, n);
    }
    for (auto [name, field] : {std::pair{"sum_logprob", &s.sum_logprob}, {"min_logprob", &s.min_logprob},
                               {"first_entropy", &s.first_entropy}, {"sum_entropy", &s.sum_entropy},
                               {"last_mean_logprob", &s.last_mean_logprob}, {"last_min_logprob", &s.last_min_logprob},
                               {"last_first_entropy", &s.last_first_entropy},
                               {"last_mean_entropy", &s.last_mean_entropy}, {"run_min_conf", &s.run_min_conf},
                               {"run_prod_conf", &s.run_prod_conf}, {"flops", &s.flops}}) {
      *field = a.get<double>(name, n);
    }
    for (auto [name, field] : {std::pair{"flops_per_token", &s.flops_per_token}, {"flops_per_pair", &s.flops_per_pair},
                               {"window_flops_per_pair", &s.window_flops_per_pair}}) {
      *field = a.get<double>(name, k);
    }
    for (auto [name, field] :
         {std::pair{"paused", &s.paused}, {"ignore_eos", &s.ignore_eos}, {"drafting", &s.drafting}}) {
      *field = a.get<bool>(name, n);
    }
    s.written = a.get<std::int64_t>("written", s.num_models * n);
    s.forward_tokens = a.get<std::int64_t>("forward_tokens", k * n);
    s.phase = a.get<std::int8_t>("phase", n);
    s.temperature = a.get<float>("temperature", n);
    s.top_p = a.get<float>("top_p", n);
    s.budget = a.get<float>("budget", n);
    s.key = a.get<std::uint64_t>("key", n);
    s.route_key = a.get<std::uint64_t>("route_key", n);
    s.windows = a.get<std::int64_t>("windows", k);
    s.home = a.get<std::int64_t>("home", s.num_parts);
    s.table = a.get<std::int64_t>("table", parts * s.table_width);
    s.num_pages = a.get<std::int64_t>("num_pages", parts);
    s.kv_len = a.get<std::int64_t>("kv_len", parts);
    s.shared = a.get<bool>("shared", parts);
    return s;
  }

  static roro::EngineStage stage(const py::dict& arrays, const py::dict& sizes) {
    const Arrays a(arrays);
    const std::int64_t t = size(sizes, "max_tokens"), n = size(sizes, "num_slots");
    std::int64_t* tokens = a.get<std::int64_t>("batch_tokens", 4 * t);
    std::int64_t* rows = a.get<std::int64_t>("batch_rows", 5 * (n + 1));
    float* numbers = a.get<float>("batch_numbers", 3 * n);
    return {t, tokens, tokens + t, tokens + 2 * t, tokens + 3 * t,
            rows, rows + (n + 1), rows + 2 * (n + 1), rows + 3 * (n + 1), rows + 4 * (n + 1),
            numbers, numbers + n, numbers + 2 * n,
            a.get<std::int64_t>("batch_pages", n * size(sizes, "table_width"))};
  }

  static std::vector<roro::PartPool> pools_of(const py::list& pools) {
    std::vector<roro::PartPool> out;
    for (const py::handle& p : pools) {
      const auto [pool, number] = p.cast<std::pair<roro::PagePool*, std::int64_t>>();
      out.push_back({pool, number});
    }
    return out;
  }

  static std::vector<roro::Vocabulary> ends(const py::list& delimiters, const py::list& eos) {
    std::vector<roro::Vocabulary> out;
    for (std::size_t m = 0; m < delimiters.size(); ++m) {
      const auto table = py::cast<py::array>(delimiters[m]), ids = py::cast<py::array>(eos[m]);
      if (table.ndim() != 2) throw py::value_error("delimiters: expected two dimensions");
      out.push_back({Arrays::at<std::int64_t>("delimiters", table, table.size()), table.shape(0), table.shape(1),
                     Arrays::at<std::int64_t>("eos", ids, ids.size()), ids.size()});
    }
    return out;
  }

  py::tuple kept_;
  roro::Batcher batcher_;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Scheduler hot paths: page allocator, prefix hashing, catch-up planner.";

  py::class_<roro::PagePool>(m, "PagePool")
      .def(py::init<std::int64_t, std::vector<std::int64_t>>(), py::arg("num_slabs"), py::arg("pages_per_slab"))
      .def("alloc", &roro::PagePool::alloc, py::arg("model"), py::arg("n"))
      .def("incref", &roro::PagePool::incref, py::arg("model"), py::arg("pages"))
      .def("decref", &roro::PagePool::decref, py::arg("model"), py::arg("pages"))
      .def("refcount", &roro::PagePool::refcount, py::arg("model"), py::arg("page"))
      .def("available", &roro::PagePool::available, py::arg("model"))
      .def("used", &roro::PagePool::used, py::arg("model"))
      .def_property_readonly("free_slabs", &roro::PagePool::free_slabs)
      .def_property_readonly("num_slabs", &roro::PagePool::num_slabs)
      .def_property_readonly("pages_per_slab", &roro::PagePool::pages_per_slab);

  m.def(
      "chain_hash",
      [](const py::int_& parent, const py::object& tokens) {
        return with_tokens(tokens, [&](const std::int64_t* data, std::int64_t n) {
          return roro::chain_hash(key_of(parent), data, n);
        });
      },
      py::arg("parent"), py::arg("tokens"));
  m.def(
      "chain_hashes",
      [](const py::int_& root, const py::object& tokens, std::int64_t page_size) {
        return with_tokens(tokens, [&](const std::int64_t* data, std::int64_t n) {
          return roro::chain_hashes(key_of(root), data, n, page_size);
        });
      },
      py::arg("root"), py::arg("tokens"), py::arg("page_size"));

  py::class_<BatcherHolder>(m, "Batcher")
      .def(py::init<const py::dict&, const py::dict&, const py::list&, const py::list&, const py::list&>(),
           py::arg("arrays"), py::arg("sizes"), py::arg("pools"), py::arg("delimiters"), py::arg("eos"))
      .def("census", &BatcherHolder::census)
      .def("schedule", &BatcherHolder::schedule, py::arg("part"))
      .def("lay_out", &BatcherHolder::lay_out, py::arg("part"), py::arg("rows"), py::arg("start"), py::arg("count"))
      .def("plain", &BatcherHolder::plain, py::arg("model"), py::arg("rows"), py::arg("finite"))
      .def("append", &BatcherHolder::append, py::arg("model"), py::arg("rows"), py::arg("token"), py::arg("logprob"),
           py::arg("entropy"))
      .def("boundary", &BatcherHolder::boundary, py::arg("rows"), py::arg("drafts"));

  m.def("plan", &plan, py::arg("tokens"), py::arg("rows"), py::arg("start"), py::arg("count"), py::arg("page_table"),
        py::arg("page_size"));
}
