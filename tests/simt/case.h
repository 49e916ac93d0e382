// A case's tensors by name, as tests/simt_cases.py writes them. Each lies in memory of exactly its size, so that
// AddressSanitizer sees a step outside.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/common/dtype.h"

struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  void* data = nullptr;

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t n : shape) count *= n;
    return count;
  }
  int64_t element_bytes() const {
    return dtype == "int64" || dtype == "float64" ? 8 : dtype == "float32" || dtype == "int32" ? 4 : 2;
  }
  size_t bytes() const { return static_cast<size_t>(numel() * element_bytes()); }
  dcx::DType kernel_dtype() const {
    return dtype == "bfloat16"  ? dcx::DType::kBF16
           : dtype == "float16" ? dcx::DType::kF16
           : dtype == "float64" ? dcx::DType::kF64
                                : dcx::DType::kF32;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

class Case {
 public:
  explicit Case(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("no case " + path);
    std::vector<std::string> order;
    for (std::string line; std::getline(in, line) && !line.empty();) {
      std::istringstream words(line);
      std::string name;
      Array array;
      words >> name >> array.dtype;
      for (int64_t n; words >> n;) array.shape.push_back(n);
      arrays_[name] = array;
      order.push_back(name);
    }
    for (const std::string& name : order) {
      Array& array = arrays_[name];
      array.data = reserve(array.bytes());
      in.read(static_cast<char*>(array.data), static_cast<std::streamsize>(array.bytes()));
    }
  }
  bool has(const std::string& name) const { return arrays_.count(name) != 0; }
  const Array& at(const std::string& name) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) throw std::runtime_error("the case lacks " + name);
    return found->second;
  }
  // The data, or null where the case has no such tensor.
  template <class T>
  T* data(const std::string& name) const {
    return has(name) ? at(name).as<T>() : nullptr;
  }
  int64_t number(const std::string& name) const { return *at(name).as<int64_t>(); }
  int64_t number(const std::string& name, int64_t otherwise) const { return has(name) ? number(name) : otherwise; }

  // A new tensor, filled with NaN (integers: -1), that goes into the answer.
  Array& output(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape) {
    Array array;
    array.dtype = dtype;
    array.shape = shape;
    array.data = reserve(array.bytes());
    if (array.bytes() > 0) memset(array.data, 0xff, array.bytes());
    outputs_.push_back(name);
    return arrays_[name] = array;
  }
  // Memory of exactly so many bytes, filled with 0xff, that does not go into the answer.
  void* scratch(size_t bytes) {
    void* data = reserve(bytes);
    if (bytes > 0) memset(data, 0xff, bytes);
    return data;
  }
  void write(const std::string& path) const {
    std::ofstream out(path, std::ios::binary);
    for (const std::string& name : outputs_) {
      out << name << ' ' << at(name).dtype;
      for (int64_t n : at(name).shape) out << ' ' << n;
      out << '\n';
    }
    out << '\n';
    for (const std::string& name : outputs_)
      out.write(at(name).as<char>(), static_cast<std::streamsize>(at(name).bytes()));
  }

 private:
  static void* reserve(size_t bytes) {
    void* data = nullptr;
    if (bytes > 0 && posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    return data;
  }
  std::map<std::string, Array> arrays_;
  std::vector<std::string> outputs_;
};

// Each tests/simt/<op>.cpp defines it: runs the kernels on one case and adds the outputs.
void run_case(Case& c);
