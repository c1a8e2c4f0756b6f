/* NVIDIA's management library as far as rigserve asks it, for machines without a card.

   Names, versions, structs and units are those of NVIDIA's nvml.h (driver 570). Two cards: a GeForce RTX 3090 as
   it is found in a gaming PC, and a GeForce GTX 1070, whose driver tells less. FAKE_NVML names a fault to show. */
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;
enum {
    NVML_SUCCESS = 0, NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9, NVML_ERROR_NO_PERMISSION = 4, NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
};

typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

#define CARD(device) ((long)(device) - 1)
#define MIB (1024ull * 1024ull)
static int is_fault(const char *name) {
    const char *fault = getenv("FAKE_NVML");
    return fault && !strcmp(fault, name);
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    if (is_fault("not loaded")) return NVML_ERROR_DRIVER_NOT_LOADED;
    if (is_fault("mismatch")) return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    if (is_fault("forbidden")) return NVML_ERROR_NO_PERMISSION;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
    default: return "Not Supported";
    }
}
nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    strncpy(version, "570.133.07", length);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { *version = 12080; return NVML_SUCCESS; }
nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = is_fault("no cards") ? 0 : 2;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    *device = (nvmlDevice_t)(long)(index + 1);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    strncpy(name, CARD(device) ? "NVIDIA GeForce GTX 1070" : "NVIDIA GeForce RTX 3090", length);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    strncpy(uuid, CARD(device) ? "GPU-6b1c2f0e-1f83-52a4-9d2e-7c5f0a3b8e14"
                               : "GPU-3f2a9c41-77de-4f0b-8a35-c1e2d4b69f70", length);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    memory->total = (CARD(device) ? 8192 : 24576) * MIB;
    memory->used = (CARD(device) ? 100 : 2311) * MIB;
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    *major = CARD(device) ? 6 : 8;
    *minor = CARD(device) ? 1 : 6;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCurrPcieLinkGeneration(nvmlDevice_t device, unsigned int *generation) {
    *generation = CARD(device) ? 3 : 1; /* an idle card saves power */
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMaxPcieLinkGeneration(nvmlDevice_t device, unsigned int *generation) {
    *generation = CARD(device) ? 3 : 4;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCurrPcieLinkWidth(nvmlDevice_t device, unsigned int *width) {
    *width = CARD(device) ? 4 : 16;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMaxPcieLinkWidth(nvmlDevice_t device, unsigned int *width) {
    (void)device;
    *width = 16;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned int *milliwatts) {
    *milliwatts = CARD(device) ? 151000 : 280000;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t device, unsigned int *milliwatts) {
    if (CARD(device)) return NVML_ERROR_NOT_SUPPORTED;
    *milliwatts = 350000;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *milliwatts) {
    *milliwatts = CARD(device) ? 8000 : 21000;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    if (CARD(device)) return NVML_ERROR_NOT_SUPPORTED; /* there since Volta */
    *millijoules = 84611370;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned int *mode) {
    *mode = CARD(device) ? 0 : 1;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                     nvmlProcessInfo_t *processes) {
    unsigned int room = *count;
    if (CARD(device)) return NVML_ERROR_NOT_SUPPORTED;
    *count = 2;
    if (room < 2) return NVML_ERROR_INSUFFICIENT_SIZE;
    memset(processes, 0, 2 * sizeof *processes);
    processes[0].pid = 4242;
    processes[0].usedGpuMemory = 1843 * MIB + 1;
    processes[1].pid = 4243;
    processes[1].usedGpuMemory = ~0ull; /* not available */
    return NVML_SUCCESS;
}
