#include "packing.h"

#include <ATen/ops/from_blob.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dcx {

#ifdef __linux__
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

at::Tensor empty_weights(int64_t numel, const at::TensorOptions& options) {
  const size_t bytes = static_cast<size_t>(numel) * options.dtype().itemsize();
  if (bytes < kHugePage) return at::empty({numel}, options);
  // Room for the first multiple of a huge page to begin at; what lies before and behind goes back at once.
  const size_t whole = bytes + kHugePage;
  char* mapped = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapped == MAP_FAILED) return at::empty({numel}, options);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(mapped) % kHugePage) % kHugePage;
  constexpr size_t kPage = 4096;
  const size_t kept = (bytes + kPage - 1) / kPage * kPage, behind = whole - before - kept;
  char* data = mapped + before;
  if (before > 0) munmap(mapped, before);
  if (behind >= kPage) munmap(data + kept, behind / kPage * kPage);
  // The rest stays in small pages: a huge one would take up to 2 MB that nothing needs.
  madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return at::from_blob(data, {numel}, [kept](void* memory) { munmap(memory, kept); }, options);
}
#else
at::Tensor empty_weights(int64_t numel, const at::TensorOptions& options) { return at::empty({numel}, options); }
#endif

}  // namespace dcx
