// What a binding needs of the CUDA runtime, so that it can be compiled without CUDA's headers.
#include "cuda/device.cuh"

extern "C" {

const char* roro_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int roro_stream_capturing(void* stream, int* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t e = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return int(e);
}

int roro_stream_synchronize(void* stream) { return int(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

}
