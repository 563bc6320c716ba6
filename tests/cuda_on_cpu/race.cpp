// Threads that read what others of their block write, with a barrier in between or, where there is an argument, without.
#include <cstdlib>

__global__ void rotate(const int* source, int* target, bool barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = source[threadIdx.x];
  if (barrier) __syncthreads();
  target[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

int main(int count, char**) {
  std::vector<int> source(64, 1), target(64, 0);
  cuda_on_cpu::launch(1, 64, [&] { rotate(source.data(), target.data(), count == 1); });
  return 0;
}
