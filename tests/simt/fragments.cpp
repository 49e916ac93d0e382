// Tensor cores' fragments: how a warp's lanes hold matrices, and their products; and what device.cuh names that needs
// nothing of the scheduler: votes, copies, atomics.
#include <string.h>

#include "../../kernels/common/device.cuh"

namespace simt {

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row must be aligned to 16 bytes");
  LoadMatrix mine{row, transposed, r};
  warp_together(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](void* const(&all)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      const LoadMatrix& own = *static_cast<const LoadMatrix*>(all[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          const int line = own.transposed ? 2 * (lane % 4) + i : lane / 4;
          const int column = own.transposed ? lane / 4 : 2 * (lane % 4) + i;
          const auto* source = static_cast<const LoadMatrix*>(all[matrix * 8 + line])->row;
          uint16_t bits;
          memcpy(&bits, static_cast<const char*>(source) + 2 * column, 2);
          word |= static_cast<uint32_t>(bits) << (16 * i);
        }
        own.result[matrix] = word;
      }
    }
  });
}

namespace {

// Column of the k-th value that lane quarter t holds: pairs lie side by side and again 8 later, singles 4 later.
int column_of(int t, int k, bool pairs) { return pairs ? 2 * t + k % 2 + k / 2 * 8 : t + 4 * k; }

void multiply_all(void* const (&all)[32], bool pairs) {
  float a[16][16], b[16][8];
  const int per_lane = static_cast<const Product*>(all[0])->per_lane;
  const int depth = 4 * per_lane;
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<const Product*>(all[lane]);
    for (int k = 0; k < per_lane; ++k) {
      const int column = column_of(lane % 4, k, pairs);
      a[lane / 4][column] = own.a[k];
      a[lane / 4 + 8][column] = own.a[per_lane + k];
      b[column][lane / 4] = own.b[k];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<const Product*>(all[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      double sum = static_cast<double>(own.d[i]);
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
      own.d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void multiply_fragments(Product& mine, bool pairs) {
  if (pairs)
    warp_together("mma", &mine, [](void* const(&all)[32]) { multiply_all(all, true); });
  else
    warp_together("mma.tf32", &mine, [](void* const(&all)[32]) { multiply_all(all, false); });
}

}  // namespace simt

namespace dcx {

void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  const auto round = [](float x) {  // to 10 bits of mantissa, ties away from zero
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x == x) bits = (bits + 0x1000u) & ~0x1fffu;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  const float rows[4] = {round(a[0]), round(a[2]), round(a[1]), round(a[3])};
  const float columns[2] = {round(b0), round(b1)};
  simt::Product mine{d, rows, columns, 2};
  simt::multiply_fragments(mine, false);
}

void mma_16x8x16_bytes(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  struct Bytes {
    int32_t* d;
    uint32_t a[2], b;
  };
  Bytes mine{d, {a[0], a[1]}, b};
  simt::warp_together("mma.bytes", &mine, [](void* const(&all)[32]) {
    const auto of = [&](int lane) { return static_cast<const Bytes*>(all[lane]); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int32_t sum = 0;
        for (int k = 0; k < 16; ++k) {
          const uint32_t row = of(lane / 4 * 4 + k / 4)->a[i / 2] >> (8 * (k % 4));
          const uint32_t column = of((2 * (lane % 4) + i % 2) * 4 + k / 4)->b >> (8 * (k % 4));
          sum += static_cast<int8_t>(row) * static_cast<int32_t>(column & 255);
        }
        of(lane)->d[i] = sum;
      }
  });
}

uint32_t ballot(bool value) {
  struct Vote {
    bool value;
    uint32_t result;
  } mine{value, 0};
  simt::warp_together("ballot", &mine, [](void* const(&all)[32]) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
      result |= static_cast<uint32_t>(static_cast<const Vote*>(all[lane])->value) << lane;
    for (void* lane : all) static_cast<Vote*>(lane)->result = result;
  });
  return mine.result;
}

void cp_async16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    simt::fail("cp.async: both addresses must be aligned to 16 bytes");
  simt::copy_later(shared, valid ? global : nullptr, 16);
}
void cp_async4(void* shared, const void* global, bool valid) { simt::copy_later(shared, valid ? global : nullptr, 4); }

Vector16<float> load_from_block(const float* own, int block) {
  Vector16<float> v;
  memcpy(&v, simt::in_block(own, sizeof(v), block), sizeof(v));
  return v;
}

uint32_t atomic_add(uint32_t* p, uint32_t value) {
  const uint32_t old = *p;
  *p = old + value;
  return old;
}
uint32_t atomic_count(uint32_t* p, uint32_t last) {
  const uint32_t old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}
void atomic_min(int64_t* p, int64_t value) {
  if (value < *p) *p = value;
}

}  // namespace dcx
