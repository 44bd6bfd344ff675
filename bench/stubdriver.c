// The calls of libcuda that Triton's launcher makes, doing nothing but keep what the last launch was given.
#include <cuda.h>
#include <string.h>

static int sizes[64], count;
static unsigned char seen[16384];
static size_t length;
static size_t functions;

// The bytes of each argument of the launches to come, and what the last launch was given.
void stub_expect(const int *of, int n) { memcpy(sizes, of, n * sizeof *of), count = n; }
size_t stub_seen(unsigned char *to) { return memcpy(to, seen, length), length; }
void stub_clear(void) { length = 0; }

static void keep(const void *from, size_t n) { memcpy(seen + length, from, n), length += n; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra) {
    if (!count) return CUDA_SUCCESS;
    unsigned shape[8] = {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                         config->blockDimZ, config->sharedMemBytes, config->numAttrs};
    length = 0;
    keep(&f, sizeof f), keep(&config->hStream, sizeof config->hStream), keep(shape, sizeof shape);
    for (unsigned i = 0; i < config->numAttrs; i++)
        keep(&config->attrs[i].id, sizeof config->attrs[i].id), keep(&config->attrs[i].value, sizeof(int));
    for (int i = 0; i < count; i++) keep(arguments[i], sizes[i]);
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    cuuint64_t given[16] = {type, rank, (cuuint64_t)address, interleave, swizzle, promotion, fill};
    for (unsigned i = 0; i < rank; i++) given[7 + i] = shape[i] << 32 | box[i] << 8 | steps[i];
    for (unsigned i = 0; i + 1 < rank; i++) given[12 + i] = strides[i];
    return memcpy(map, given, sizeof *map), CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *to, CUpointer_attribute what, CUdeviceptr of) {
    return *(CUdeviceptr *)to = of, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
    return *f = (CUfunction)++functions, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *to, CUdevice_attribute what, CUdevice device) { return *to = 1 << 18, CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *to, CUfunction_attribute what, CUfunction f) { return *to = 1024, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char **to) { return *to = "none", CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *to) { return *to = (CUcontext)1, CUDA_SUCCESS; }
#define NOTHING(name, ...) \
    CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxGetLimit, size_t *to, CUlimit what)
NOTHING(cuCtxSetLimit, CUlimit what, size_t to)
NOTHING(cuDeviceGet, CUdevice *to, int number)
NOTHING(cuDevicePrimaryCtxRetain, CUcontext *to, CUdevice device)
NOTHING(cuFuncSetAttribute, CUfunction f, CUfunction_attribute what, int to)
NOTHING(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache what)
NOTHING(cuModuleLoadData, CUmodule *to, const void *image)
NOTHING(cuOccupancyMaxActiveClusters, int *to, CUfunction f, const CUlaunchConfig *config)
