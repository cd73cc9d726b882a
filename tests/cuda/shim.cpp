// The launchers of csrc/cuda/api.h, forwarded to a library of emulated kernels that can be changed: the binding is
// loaded once, while tests plant faults in kernels.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "cuda/api.h"

namespace {
void* library = nullptr;

template <class F>
F* find(F*, const char* name) {
  void* symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol) throw std::runtime_error(std::string("emulated kernels lack ") + name);
  return reinterpret_cast<F*>(symbol);
}
}  // namespace

#define FORWARD(name, ...) return find(&name, #name)(__VA_ARGS__)

extern "C" {

__attribute__((visibility("default"))) const char* roro_use(const char* path) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return library ? nullptr : dlerror();
}

__attribute__((visibility("default"))) void roro_set_order(unsigned order) {
  reinterpret_cast<void (*)(unsigned)>(dlsym(library, "emu_set_order"))(order);
}

const char* roro_cuda_error(int code) { FORWARD(roro_cuda_error, code); }
int roro_stream_capturing(void* stream, int* out) { FORWARD(roro_stream_capturing, stream, out); }
int roro_stream_synchronize(void* stream) { FORWARD(roro_stream_synchronize, stream); }
int64_t roro_router_score_workspace(int64_t N, int H, int D, int K) {
  FORWARD(roro_router_score_workspace, N, H, D, K);
}
int64_t roro_router_score_tickets(int D) { FORWARD(roro_router_score_tickets, D); }
int roro_router_score(const RoroRouterScore* a, void* s) { FORWARD(roro_router_score, a, s); }
int roro_router_inputs(const RoroRouterScore* a, void* s) { FORWARD(roro_router_inputs, a, s); }
int roro_router_epilogue(const RoroRouterScore* a, void* s) { FORWARD(roro_router_epilogue, a, s); }

int roro_judge_score(const RoroJudgeScore* a, void* s) { FORWARD(roro_judge_score, a, s); }
int roro_kv_copy(const RoroKvCopy* a, void* s) { FORWARD(roro_kv_copy, a, s); }

}
