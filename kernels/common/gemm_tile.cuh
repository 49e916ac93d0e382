// What a block of conv_gemm.cuh multiplies: a tile of rows [kRows] x [kDepth] by weights [kDepth] x [kColumns], both in
// shared memory. Three kinds share one interface: tensor cores on 16-bit operands, tensor cores on tf32, and float32
// multiply-adds. Each output's products are added in rising order of the reduction, whatever the tile.
#pragma once
#include "device.cuh"

namespace dcx {

constexpr int kDepth = 32;  // channels per step

// Elements between rows of the two tiles: the padding spreads rows over the banks.
template <class T>
constexpr int kRowPitch = kDepth + 16 / static_cast<int>(sizeof(T));
template <int kColumns>
constexpr int kWeightPitch = kColumns + 8;
// Floats between rows of the accumulators' tile in shared memory.
template <int kColumns>
constexpr int kSumPitch = kColumns + 8;

// 16-bit operands; a warp owns kRows / kWarpsM rows by kColumns / kWarpsN columns.
template <class T, int kRows, int kColumns, int kWarpsM, int kWarpsN>
struct HalfTile {
  using Element = T;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kM = kRows / kWarpsM / 16;
  static constexpr int kN = kColumns / kWarpsN / 16;
  static constexpr int kSums = kM * kN * 8;
  static constexpr int kRowPointers = kM;
  static constexpr int kFlushSteps = 0;
  static constexpr bool kNeedsSm80 = DTypeOf<T>::value == DType::kBF16;
  static_assert(kM * 16 * kWarpsM == kRows && kN * 16 * kWarpsN == kColumns, "a warp owns whole 16 x 16 blocks");

  static DCX_DEVICE int first_row() { return thread_index() / kWarp / kWarpsN * (kM * 16); }
  static DCX_DEVICE int first_column() { return thread_index() / kWarp % kWarpsN * (kN * 16); }
  // The tile row whose address row pointer i is.
  static DCX_DEVICE int pointer_row(int i) { return first_row() + i * 16 + thread_index() % 16; }

  template <int kChannels = kDepth>
  static DCX_DEVICE void step(float (&sums)[kSums], const T* rows, const int (&offsets)[kRowPointers],
                              const T* weights) {
    const int lane = thread_index() % kWarp;
    const T* own_weights = weights + (lane % 16) * kWeightPitch<kColumns> + first_column() + lane / 16 * 8;
    DCX_UNROLL
    for (int k = 0; k < kChannels; k += 16) {
      uint32_t a[kM][4];
      DCX_UNROLL
      for (int m = 0; m < kM; ++m) ldmatrix_x4(a[m], rows + offsets[m] + k + lane / 16 * 8);
      DCX_UNROLL
      for (int n = 0; n < kN; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, own_weights + k * kWeightPitch<kColumns> + n * 16);
        DCX_UNROLL
        for (int m = 0; m < kM; ++m) {
          float (&block)[8] = *reinterpret_cast<float (*)[8]>(sums + (m * kN + n) * 8);
          mma_16x8x16<T>(*reinterpret_cast<float (*)[4]>(block), a[m], b[0], b[1]);
          mma_16x8x16<T>(*reinterpret_cast<float (*)[4]>(block + 4), a[m], b[2], b[3]);
        }
      }
    }
  }

  static DCX_DEVICE void store(const float (&sums)[kSums], float* out) {
    const int lane = thread_index() % kWarp;
    DCX_UNROLL
    for (int m = 0; m < kM; ++m) DCX_UNROLL
    for (int n = 0; n < kN * 2; ++n) DCX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row() + m * 16 + half * 8 + lane / 4;
      float* to = out + row * kSumPitch<kColumns> + first_column() + n * 8 + lane % 4 * 2;
      to[0] = sums[(m * kN * 2 + n) * 4 + half * 2];
      to[1] = sums[(m * kN * 2 + n) * 4 + half * 2 + 1];
    }
  }
};

// float32 operands rounded to tf32.
template <int kRows, int kColumns, int kWarpsM, int kWarpsN>
struct Tf32Tile {
  using Element = float;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kM = kRows / kWarpsM / 16;
  static constexpr int kN = kColumns / kWarpsN / 8;
  static constexpr int kSums = kM * kN * 4;
  static constexpr int kRowPointers = 2 * kM;
  static constexpr int kFlushSteps = 0;
  static constexpr bool kNeedsSm80 = true;

  static DCX_DEVICE int first_row() { return thread_index() / kWarp / kWarpsN * (kM * 16); }
  static DCX_DEVICE int first_column() { return thread_index() / kWarp % kWarpsN * (kN * 8); }
  static DCX_DEVICE int pointer_row(int i) { return first_row() + i * 8 + thread_index() % kWarp / 4; }

  static DCX_DEVICE void step(float (&sums)[kSums], const float* rows, const int (&offsets)[kRowPointers],
                              const float* weights) {
    const int lane = thread_index() % kWarp;
    DCX_UNROLL
    for (int k = 0; k < kDepth; k += 8) {
      float a[kM][4];
      DCX_UNROLL
      for (int m = 0; m < kM; ++m) {
        const float* low = rows + offsets[2 * m] + k + lane % 4;
        const float* high = rows + offsets[2 * m + 1] + k + lane % 4;
        a[m][0] = low[0];
        a[m][1] = high[0];
        a[m][2] = low[4];
        a[m][3] = high[4];
      }
      DCX_UNROLL
      for (int n = 0; n < kN; ++n) {
        const float* b = weights + (k + lane % 4) * kWeightPitch<kColumns> + first_column() + n * 8 + lane / 4;
        DCX_UNROLL
        for (int m = 0; m < kM; ++m)
          mma_16x8x8_tf32(*reinterpret_cast<float (*)[4]>(sums + (m * kN + n) * 4), a[m], b[0],
                          b[4 * kWeightPitch<kColumns>]);
      }
    }
  }

  static DCX_DEVICE void store(const float (&sums)[kSums], float* out) {
    const int lane = thread_index() % kWarp;
    DCX_UNROLL
    for (int m = 0; m < kM; ++m) DCX_UNROLL
    for (int n = 0; n < kN; ++n) DCX_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row() + m * 16 + half * 8 + lane / 4;
      float* to = out + row * kSumPitch<kColumns> + first_column() + n * 8 + lane % 4 * 2;
      to[0] = sums[(m * kN + n) * 4 + half * 2];
      to[1] = sums[(m * kN + n) * 4 + half * 2 + 1];
    }
  }
};

// float32 as it is: a thread owns rows 8 apart by 4 neighbouring columns. Sums of 128 products are added to the total,
// since one long chain rounds more than plain PyTorch does.
template <int kRows, int kColumns>
struct FloatTile {
  using Element = float;
  static constexpr int kThreads = 8 * (kColumns / 4);
  static constexpr int kRowPointers = kRows / 8;
  static constexpr int kSums = kRowPointers * 4;
  static constexpr int kFlushSteps = 4;
  static constexpr bool kNeedsSm80 = false;

  static DCX_DEVICE int first_column() { return thread_index() % (kColumns / 4) * 4; }
  static DCX_DEVICE int pointer_row(int i) { return thread_index() / (kColumns / 4) + i * 8; }

  static DCX_DEVICE void step(float (&sums)[kSums], const float* rows, const int (&offsets)[kRowPointers],
                              const float* weights) {
    DCX_NO_UNROLL
    for (int k = 0; k < kDepth; k += 4) {
      Vector16<float> b[4];
      DCX_UNROLL
      for (int i = 0; i < 4; ++i)
        b[i] = *reinterpret_cast<const Vector16<float>*>(weights + (k + i) * kWeightPitch<kColumns> + first_column());
      DCX_UNROLL
      for (int r = 0; r < kRowPointers; ++r) {
        const Vector16<float> a = *reinterpret_cast<const Vector16<float>*>(rows + offsets[r] + k);
        DCX_UNROLL
        for (int i = 0; i < 4; ++i) DCX_UNROLL
        for (int n = 0; n < 4; ++n) sums[r * 4 + n] = fused_multiply_add(a.values[i], b[i].values[n], sums[r * 4 + n]);
      }
    }
  }

  static DCX_DEVICE void store(const float (&sums)[kSums], float* out) {
    DCX_UNROLL
    for (int r = 0; r < kRowPointers; ++r) DCX_UNROLL
    for (int n = 0; n < 4; ++n) out[pointer_row(r) * kSumPitch<kColumns> + first_column() + n] = sums[r * 4 + n];
  }
};

}  // namespace dcx
