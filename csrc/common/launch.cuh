// Launching kernels: grids that CUDA takes, and errors in fastcap's form.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "check.h"

namespace fastcap {

// The x of a grid of so many blocks, which `argument` asks for.
inline unsigned grid_of(const char* op, const char* argument, int64_t blocks) {
  if (blocks > 2147483647) bad(op, argument, "need at most 2^31 - 1 blocks", blocks, "split the batch");
  return static_cast<unsigned>(blocks);
}

// Raises where the launch before it failed: by its own fault, or because the device is lost since an earlier one.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  const char* remedy = "find what failed first with CUDA_LAUNCH_BLOCKING=1";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
    remedy = "build fastcap with FASTCAP_ARCHS of this GPU, or use backend('triton')";
  else if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice)
    remedy = "install the NVIDIA driver that this CUDA needs";
  bad(op, "the kernel", "launch on this GPU", cudaGetErrorString(error), remedy);
}

}  // namespace fastcap
