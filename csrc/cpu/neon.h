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
// Bits of Linux's interface, by their number because older headers do not name all of them.
inline bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) == 1; }  // HWCAP_ASIMDDP
inline bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) == 1; }    // HWCAP2_I8MM
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
