// SPDX-License-Identifier: Apache-2.0
// A libnvidia-ml.so.1 for machines without a GPU: as much of NVML as this project calls. Read at every call:
//   FAKE_NVML_GPUS    how many GPUs there are (default 0)
//   FAKE_NVML_DRIVER  the driver's version (default 580.95.05)
//   FAKE_NVML_CUDA    the CUDA it supports (default 13.0); empty: its libcuda is not in the container
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, LIBRARY_NOT_FOUND = 12 };

typedef struct { unsigned long long total, free, used; } Memory;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}

static unsigned num_gpus(void) { return (unsigned)atoi(setting("FAKE_NVML_GPUS", "0")); }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code == LIBRARY_NOT_FOUND ? "Library Not Found" : "Invalid Argument"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
  snprintf(version, length, "%s", setting("FAKE_NVML_DRIVER", "580.95.05"));
  return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  int major, minor;
  if (sscanf(setting("FAKE_NVML_CUDA", "13.0"), "%d.%d", &major, &minor) != 2) return LIBRARY_NOT_FOUND;
  *version = 1000 * major + 10 * minor;
  return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) { *count = num_gpus(); return SUCCESS; }

// A handle is the GPU's index plus one, so that none is null.
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index >= num_gpus()) return INVALID_ARGUMENT;
  *device = (void *)(size_t)(index + 1);
  return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  (void)device;
  snprintf(name, length, "NVIDIA Fake 24GB");
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  (void)device;
  memory->total = 24ULL << 30;
  memory->used = 1ULL << 30;
  memory->free = memory->total - memory->used;
  return SUCCESS;
}
