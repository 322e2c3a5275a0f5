// The functions of libcuda.so.1 that Triton's launcher calls, on a machine without a driver: all succeed and do nothing.
// cuInit says that there is no device, so that CUDA's own runtime, should anything ask it, finds none.
#include <stdint.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, NO_DEVICE = 100 };

static int handle;

Result cuInit(unsigned flags) { return NO_DEVICE; }
Result cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
Result cuGetErrorString(Result error, const char** text) { *text = "there is no driver here"; return SUCCESS; }
Result cuCtxGetCurrent(void** context) { *context = &handle; return SUCCESS; }
Result cuCtxSetCurrent(void* context) { return SUCCESS; }
Result cuCtxGetLimit(size_t* value, int limit) { *value = 1 << 20; return SUCCESS; }
Result cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { *context = &handle; return SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { *device = ordinal; return SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8: case 97: *value = 232448; break;  // shared memory of a block, at most
    case 81: *value = 233472; break;          // of a multiprocessor
    case 16: *value = 132; break;             // multiprocessors
    default: *value = 1024;
  }
  return SUCCESS;
}
Result cuModuleLoadData(void** module, const void* image) {
  *module = &handle;
  return memcmp(image, "\177ELF", 4) ? 200 : SUCCESS;  // an image that is none is refused
}
Result cuModuleGetFunction(void** function, void* module, const char* name) { *function = &handle; return SUCCESS; }
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads of a block, at most; registers and memory are not known
  return SUCCESS;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return SUCCESS; }
Result cuFuncSetCacheConfig(void* function, int config) { return SUCCESS; }
Result cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return SUCCESS; }
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) { *(uint64_t*)value = pointer; return SUCCESS; }
Result cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { *clusters = 1; return SUCCESS; }
Result cuTensorMapEncodeTiled(void* map) { return SUCCESS; }
