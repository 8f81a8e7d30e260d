// The instruction sets that there are screening kernels for on this architecture.
#pragma once

#include <string>
#include <vector>

#include "screening.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 intrinsics start from `__m512 y = y` (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__)
#include "avx2.h"
#include "avx512_vnni.h"
#include "avx_vnni.h"
#elif defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
// An older Clang declares the intrinsics only if the command line allows the instructions everywhere.
#define SK_NEON
#include "neon_dotprod.h"
#include "neon_i8mm.h"
#endif

namespace splade_kernels::cpu {

// Fastest first. The null pointer ends the list, which is empty on other processors.
constexpr const InstructionSet* kInstructionSets[] = {
#if defined(__x86_64__)
    &avx512_vnni::instruction_set,
    &avx_vnni::instruction_set,
    &avx2::instruction_set,
#elif defined(SK_NEON)
    &neon_i8mm::instruction_set,
    &neon_dotprod::instruction_set,
#endif
    nullptr};

// The names of those that this CPU has, fastest first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* set = kInstructionSets; *set != nullptr; ++set) {
    if ((*set)->supported()) names.emplace_back((*set)->name);
  }
  return names;
}

}  // namespace splade_kernels::cpu
