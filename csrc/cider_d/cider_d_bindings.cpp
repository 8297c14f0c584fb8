// Python's captions to numbers, with the interpreter's lock; the rest without. Messages are those of the plain Python.
#include "cider_d_bindings.h"

#include <cmath>
#include <cstring>

#include "../common/check.h"
#include "../common/tensor_caster.h"
#include "cider_d.h"

namespace py = pybind11;

namespace fastcap {
namespace {

constexpr const char* kOp = "rewards.CiderD";

enum class Kind { kOpen, kWords, kIds };  // open: no caption had a word so far

// Of errors in Python's own code only these mean that a value is none of the kind; the others are the caller's.
void clear_if(PyObject* type) {
  if (!PyErr_ExceptionMatches(type)) throw py::error_already_set();
  PyErr_Clear();
}

py::object fast_or_null(py::handle value) {
  PyObject* made = PySequence_Fast(value.ptr(), "");
  if (made == nullptr) clear_if(PyExc_TypeError);
  return py::reinterpret_steal<py::object>(made);
}

bool is_usual(py::handle value) { return PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()); }

bool is_mapping(py::handle value) {
  return !is_usual(value) && py::isinstance(value, py::module_::import("collections.abc").attr("Mapping"));
}

std::string type_name(py::handle value) {
  return "'" + py::str(py::type::of(value).attr("__name__")).cast<std::string>() + "'";
}

bool is_python_space(unsigned char c) { return c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31); }

// Reads captions and numbers their words.
class Reader {
 public:
  Reader(const char* name, CiderWords& words, Kind kind) : name_(name), words_(words), kind_(kind) {}
  Kind kind() const { return kind_; }

  CiderText flat(py::handle captions) {
    const py::object list = fast_or_null(captions);
    if (!list) bad(kOp, name_, "be a list", type_name(captions), "pass a list of captions for each image");
    CiderText made;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
    for (at_[0] = 0, depth_ = 1; at_[0] < count && at_[0] < PySequence_Fast_GET_SIZE(list.ptr()); ++at_[0])
      read(PySequence_Fast_GET_ITEM(list.ptr(), at_[0]), made);
    return made;
  }

  CiderText nested(py::handle groups) {
    const py::object list = fast_or_null(groups);
    if (!list) bad(kOp, name_, "be a list", type_name(groups), "pass a list of captions for each image");
    CiderText made;
    for (at_[0] = 0; at_[0] < PySequence_Fast_GET_SIZE(list.ptr()); ++at_[0]) {
      depth_ = 1;
      const py::object group = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(list.ptr(), at_[0]));
      if (is_mapping(group))
        bad(kOp, where(), "be a list", "'a mapping'", std::string("pass list(") + name_ + ".values()), in one order");
      const bool text = PyUnicode_Check(group.ptr()) || PyBytes_Check(group.ptr());
      const bool listed = is_usual(group) || (py::hasattr(group, "__len__") && py::hasattr(group, "__getitem__"));
      const py::object captions = text || !listed ? py::object() : fast_or_null(group);
      if (!captions) bad(kOp, where(), "be a list", type_name(group), "pass a list of captions for each image");
      if (PySequence_Fast_GET_SIZE(captions.ptr()) == 0)
        bad(kOp, where(), "have a caption", "'none'", "leave that image out");
      depth_ = 2;
      for (at_[1] = 0; at_[1] < PySequence_Fast_GET_SIZE(captions.ptr()); ++at_[1])
        read(PySequence_Fast_GET_ITEM(captions.ptr(), at_[1]), made);
      made.group.push_back(made.captions());
    }
    return made;
  }

 private:
  std::string where() const {
    std::string made = name_;
    for (int i = 0; i < depth_; ++i) made += "[" + std::to_string(at_[i]) + "]";
    return made;
  }

  // borrowed: reading it can run Python's code, which can take it out of its list.
  void read(PyObject* borrowed, CiderText& out) {
    const auto caption = py::reinterpret_borrow<py::object>(borrowed);
    if (PyUnicode_Check(caption.ptr())) {
      read_text(caption, out);
    } else {
      const bool wrong = PyBytes_Check(caption.ptr()) || is_mapping(caption);
      const py::object words = wrong ? py::object() : fast_or_null(caption);
      if (!words) bad(kOp, where(), "be a caption", type_name(caption), "pass strings, or lists of words or of ids");
      if (PySequence_Fast_GET_SIZE(words.ptr()) > 0) read_list(words, out);
    }
    out.begin.push_back(static_cast<int64_t>(out.words.size()));
  }

  void read_text(py::handle caption, CiderText& out) {
    if (!PyUnicode_IS_ASCII(caption.ptr())) {  // white space has other forms there
      const auto words = py::reinterpret_steal<py::object>(PyUnicode_Split(caption.ptr(), nullptr, -1));
      if (!words) throw py::error_already_set();
      if (PyList_GET_SIZE(words.ptr()) > 0) read_list(words, out);
      return;
    }
    const auto* text = reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(caption.ptr()));
    const Py_ssize_t length = PyUnicode_GET_LENGTH(caption.ptr());
    for (Py_ssize_t i = 0; i < length;) {
      while (i < length && is_python_space(text[i])) ++i;
      const Py_ssize_t first = i;
      while (i < length && !is_python_space(text[i])) ++i;
      if (i == first) break;
      take(Kind::kWords);
      out.words.push_back(words_.add(text + first, i - first));
    }
  }

  // A list or a tuple with an entry.
  void read_list(const py::object& words, CiderText& out) {
    const bool text = PyUnicode_Check(PySequence_Fast_GET_ITEM(words.ptr(), 0));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(words.ptr()); ++i) {
      const auto word = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(words.ptr(), i));
      if (PyUnicode_Check(word.ptr()) != text) mixed(words);
      if (text) {
        take(Kind::kWords);
        out.words.push_back(add(word));
        continue;
      }
      const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(word.ptr()));
      const int64_t id = index ? PyLong_AsLongLong(index.ptr()) : -1;
      if (PyErr_Occurred()) {
        clear_if(PyErr_ExceptionMatches(PyExc_OverflowError) ? PyExc_OverflowError : PyExc_TypeError);
        mixed(words);
      }
      take(Kind::kIds);
      out.words.push_back(words_.add(reinterpret_cast<const char*>(&id), sizeof id));
    }
  }

  uint32_t add(const py::object& word) {
    Py_ssize_t length;
    const char* text = PyUnicode_AsUTF8AndSize(word.ptr(), &length);
    if (text != nullptr) return words_.add(text, length);
    PyErr_Clear();  // half of a surrogate pair, which UTF-8 proper does not have
    const auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(word.ptr(), "utf-8", "surrogatepass"));
    if (!bytes) throw py::error_already_set();
    return words_.add(PyBytes_AS_STRING(bytes.ptr()), PyBytes_GET_SIZE(bytes.ptr()));
  }

  void take(Kind kind) {
    if (kind_ == kind) return;
    if (kind_ != Kind::kOpen) {
      const bool words = kind_ == Kind::kWords;
      bad(kOp, where(), std::string("be of ") + (words ? "words" : "ids") + ", as the first caption",
          words ? "'ids'" : "'words'", "tokenise all captions alike");
    }
    kind_ = kind;
  }

  [[noreturn]] void mixed(const py::object& words) const {
    py::set names;
    for (py::handle word : py::reinterpret_borrow<py::list>(py::list(words))) names.add(py::type::of(word).attr("__name__"));
    const py::list sorted = py::module_::import("builtins").attr("sorted")(names);
    const auto got = py::str(", ").attr("join")(sorted).cast<std::string>();
    bad(kOp, where(), "hold words, or ids", "'" + got + "'",
        "pass words as strings, or a tokenizer's ids as integers of 64 bits");
  }

  const char* name_;
  CiderWords& words_;
  Kind kind_;
  Py_ssize_t at_[2] = {0, 0};
  int depth_ = 1;
};

// A scorer and whether it takes words or ids.
struct Scorer {
  std::shared_ptr<CiderD> kept;
  Kind kind;
};

Scorer of_documents(py::handle documents, int n, double sigma, int threads) {
  auto words = std::make_shared<CiderWords>();
  Reader reader("documents", *words, Kind::kOpen);
  const CiderText text = reader.nested(documents);
  const py::gil_scoped_release release;
  return {std::make_shared<CiderD>(std::move(words), text, n, sigma, threads), reader.kind()};
}

// The arrays were checked by `_Table.check`; sizes are looked at again before a pointer is followed.
Scorer of_table(Tensor text, Tensor ends, Tensor is_ids, Tensor parent, Tensor word, Tensor count, int64_t documents, int n,
                double sigma) {
  const int64_t W = ends.numel(), G = parent.numel();
  check_shape(kOp, "is_ids", is_ids, {1});
  check_dtype(kOp, "text", text, DType::kUInt8);
  check_contiguous(kOp, "text", text);
  for (const Tensor& column : {ends, is_ids, parent, word, count}) {
    check_dtype(kOp, "table", column, DType::kInt64);
    check_contiguous(kOp, "table", column);
  }
  check_shape(kOp, "word", word, {G});
  check_shape(kOp, "count", count, {G});
  const bool ids = *is_ids.as<int64_t>() != 0;
  auto words = std::make_shared<CiderWords>();
  int64_t begin = 0;
  for (int64_t w = 0; w < W; ++w) {
    const int64_t end = ends.as<int64_t>()[w];
    const char* data = ids ? reinterpret_cast<const char*>(&end) : text.as<char>() + begin;
    if (!ids && (end < begin || end > text.numel())) bad(kOp, "ends", "rise within the text", end, "pass a saved table");
    if (words->add(data, ids ? sizeof end : static_cast<size_t>(end - begin)) != w)
      bad(kOp, "path", "hold each word once", "one twice", "pass a file that CiderD.save wrote");
    begin = end;
  }
  for (int64_t g = 0; g < G; ++g) {
    const int64_t before = parent.as<int64_t>()[g], last = word.as<int64_t>()[g], images = count.as<int64_t>()[g];
    if (before < -1 || before >= g || last < 0 || last >= W || images < 0 || images > documents)
      bad(kOp, "path", "hold n-grams that end earlier ones", g, "pass a file that CiderD.save wrote");
  }
  const auto *parents = parent.as<int64_t>(), *lasts = word.as<int64_t>(), *counts = count.as<int64_t>();
  auto kept = std::make_shared<CiderD>(std::move(words), parents, lasts, counts, G, documents, n, sigma);
  return {std::move(kept), W == 0 ? Kind::kOpen : ids ? Kind::kIds : Kind::kWords};
}

std::shared_ptr<CiderReferences> prepare(const Scorer& scorer, py::handle references, int threads) {
  auto words = std::make_shared<CiderWords>(scorer.kept->words());
  const CiderText text = Reader("references", *words, scorer.kind).nested(references);
  const std::shared_ptr<CiderD> kept = scorer.kept;
  const py::gil_scoped_release release;
  return kept->prepare(std::move(words), text, threads);
}

void score(const Scorer& scorer, py::handle candidates, std::shared_ptr<CiderReferences> references, Tensor rows, Tensor out,
           int threads) {
  if (!references) bad(kOp, "references", "be prepared", "None", "call prepare");
  CiderWords words(references->words);
  const CiderText text = Reader("candidates", words, scorer.kind).flat(candidates);
  const int64_t C = text.captions(), R = static_cast<int64_t>(references->group.size()) - 1;
  check_dtype(kOp, "rows", rows, DType::kInt64);
  check_dtype(kOp, "out", out, DType::kFloat64);
  for (const Tensor& each : {rows, out}) {
    check_shape(kOp, "rows and out", each, {C});
    check_contiguous(kOp, "rows and out", each);
  }
  for (int64_t c = 0; c < C; ++c) {
    const int64_t row = rows.as<int64_t>()[c];
    if (row < 0 || row >= R) bad(kOp, "rows", "lie in [0, " + std::to_string(R) + ")", row, "count the entries from 0");
  }
  const std::shared_ptr<CiderD> kept = scorer.kept;
  const py::gil_scoped_release release;
  kept->score(text, *references, rows.as<int64_t>(), out.as<double>(), threads);
}

// (words, bytes of their text, n-grams)
py::tuple table_sizes(const Scorer& scorer) {
  const CiderWords& words = *scorer.kept->words();
  const int64_t bytes = scorer.kind == Kind::kIds ? 0 : words.bytes();
  return py::make_tuple(static_cast<int64_t>(words.size()), bytes, scorer.kept->grams());
}

void write_table(const Scorer& scorer, Tensor text, Tensor ends, Tensor is_ids, Tensor parent, Tensor word, Tensor count) {
  const CiderWords& words = *scorer.kept->words();
  const bool ids = scorer.kind == Kind::kIds;
  check_dtype(kOp, "text", text, DType::kUInt8);
  check_shape(kOp, "text", text, {ids ? 0 : words.bytes()});
  check_shape(kOp, "is_ids", is_ids, {1});
  check_shape(kOp, "ends", ends, {static_cast<int64_t>(words.size())});
  for (const Tensor& column : {ends, is_ids, parent, word, count}) {
    check_dtype(kOp, "table", column, DType::kInt64);
    check_contiguous(kOp, "table", column);
  }
  for (const Tensor& column : {parent, word, count}) check_shape(kOp, "table", column, {scorer.kept->grams()});
  *is_ids.as<int64_t>() = ids;
  if (ids) {
    std::memcpy(ends.as<int64_t>(), words.text().data(), words.text().size());
  } else {
    std::memcpy(text.as<char>(), words.text().data(), words.text().size());
    std::copy(words.ends().begin(), words.ends().end(), ends.as<int64_t>());
  }
  scorer.kept->table(parent.as<int64_t>(), word.as<int64_t>(), count.as<int64_t>());
}

void check_numbers(int n, double sigma, int64_t documents) {
  if (n < 1 || n > kMostOrders) bad(kOp, "n", "be an integer in [1, 8]", n, "pass n=4, the published one");
  if (!(sigma > 0) || std::isinf(sigma)) bad(kOp, "sigma", "be a positive finite number", sigma, "pass sigma=6.0");
  if (documents < 1) bad(kOp, "documents", "be of at least 2 images", documents, "pass more");
}

}  // namespace

void bind_cider_d(py::module_& m) {
  py::class_<CiderReferences, std::shared_ptr<CiderReferences>>(m, "CiderReferences");
  py::class_<Scorer>(m, "CiderD")
      .def(py::init([](py::handle documents, int n, double sigma, int threads) {
             check_numbers(n, sigma, 1);
             return of_documents(documents, n, sigma, threads);
           }),
           py::arg("documents"), py::arg("n"), py::arg("sigma"), py::arg("threads"))
      .def_static("from_table",
                  [](Tensor text, Tensor ends, Tensor is_ids, Tensor parent, Tensor word, Tensor count, int64_t documents,
                     int n, double sigma) {
                    check_numbers(n, sigma, documents);
                    return of_table(text, ends, is_ids, parent, word, count, documents, n, sigma);
                  })
      .def("documents", [](const Scorer& scorer) { return scorer.kept->own(); })
      .def("num_documents", [](const Scorer& scorer) { return scorer.kept->documents(); })
      .def("prepare", &prepare)
      .def("score", &score)
      .def("table_sizes", &table_sizes)
      .def("write_table", &write_table);
}

}  // namespace fastcap
