// What the instruction sets of Arm share: the intrinsics, and the questions to the operating system.
#pragma once

#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace splade_kernels::cpu {

#if defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_I8MM of Linux, which the headers of an older system do not name.
constexpr unsigned long kDotprodBit = 1UL << 20, kI8mmBit = 1UL << 13;
inline bool has_dotprod() { return (getauxval(AT_HWCAP) & kDotprodBit) != 0; }
inline bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mmBit) != 0; }
#elif defined(__APPLE__)
inline bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
inline bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dotprod() { return false; }
inline bool has_i8mm() { return false; }
#endif

}  // namespace splade_kernels::cpu
