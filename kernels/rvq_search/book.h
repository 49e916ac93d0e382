// One stage's codebook as the searches read it, register by register of entries.
#pragma once
#include "layout.h"

#include "../common/vec.h"

namespace dcx {
namespace DCX_NS {

template <class T>
struct Book {
  const T* data;
  int64_t dim, entries, registers;

  Book(const RvqLayout& layout, const T* packed, int64_t stage)
      : data(packed + layout.books() + stage * layout.book_size()),
        dim(layout.dim),
        entries(layout.entries),
        registers(layout.groups() * kPerGroup) {}
  // [1 + dim], kCodeGroup apart: |c|^2, then the coordinates of the register's entries.
  const T* column(int64_t i) const { return data + i / kPerGroup * (dim + 1) * kCodeGroup + i % kPerGroup * kLanes<T>; }
  const T* group(int64_t g) const { return data + g * (dim + 1) * kCodeGroup; }

 private:
  static constexpr int kPerGroup = kCodeGroup / kLanes<T>;
};

}  // namespace DCX_NS
}  // namespace dcx
