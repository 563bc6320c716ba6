// Each thread reads what a thread of the other warp writes, with a barrier of the block in between or, where there is
// an argument, with barriers of warps alone.

__global__ void exchange(const int* source, int* target, bool barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = source[threadIdx.x];
  __syncwarp();
  if (barrier) __syncthreads();
  target[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

int main(int count, char**) {
  const std::vector<int> source(64, 1);
  std::vector<int> target(64, 0);
  cuda_on_cpu::launch(exchange, {1, 64}, source.data(), target.data(), count == 1);
}
