// Python module roro_fast._host: host structures of the scheduler. No torch headers here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

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

  m.def("plan", &plan, py::arg("tokens"), py::arg("rows"), py::arg("start"), py::arg("count"), py::arg("page_table"),
        py::arg("page_size"));
}
