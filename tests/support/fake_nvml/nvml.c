// SPDX-License-Identifier: Apache-2.0
// A libnvidia-ml.so.1 for machines without a GPU: as much of NVML as this project calls. Read at every call:
//   FAKE_NVML_GPUS    how many GPUs there are (default 0)
//   FAKE_NVML_DRIVER  the driver's version (default 580.95.05)
//   FAKE_NVML_CUDA    the CUDA it supports (default 13.0); empty: its libcuda is not in the container
//   FAKE_NVML_STATE   a file of one word and two numbers a line, that a test may write while jobs run:
//     utilization GPU PERCENT   instead of values that change with every call
//     throttle GPU BITS         why its clocks are held down (decimal)
//     xid GPU NUMBER            an XID, delivered once
//     lost GPU 0                it has fallen off the bus
//     old GPU 0                 before Hopper: no GPM
//     plain GPU 0               neither power, ECC nor GPM: Not Supported
//     hang GPU SECONDS          its utilization takes that long
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, TIMEOUT = 10, LIBRARY_NOT_FOUND = 12, GPU_IS_LOST = 15
};
enum { MAX_GPUS = 64 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } Event;
typedef struct { unsigned version, is_supported; } GpmSupport;
typedef struct { unsigned id; int result; double value; const char *names[3]; } GpmMetric;
typedef struct { unsigned version, count; long *earlier, *later; GpmMetric metrics[]; } GpmRequest;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}

static unsigned num_gpus(void) { return (unsigned)atoi(setting("FAKE_NVML_GPUS", "0")); }

// A handle is the GPU's index plus one, so that none is null.
static unsigned index_of(void *device) { return (unsigned)(size_t)device - 1; }
static void *handle_of(unsigned index) { return (void *)(size_t)(index + 1); }

// What the nth line with the word says; 0 if there is none. A GPU of -1 stands for any.
static int find_line(const char *word, int gpu, int nth, unsigned *index, long *number) {
  FILE *file = fopen(setting("FAKE_NVML_STATE", ""), "r");
  char found[32];
  int seen = 0, is_found = 0;
  while (file && !is_found && fscanf(file, "%31s %u %ld", found, index, number) == 3)
    is_found = !strcmp(found, word) && (gpu < 0 || *index == (unsigned)gpu) && seen++ == nth;
  if (file) fclose(file);
  return is_found;
}

static int has(const char *word, void *device) {
  unsigned index;
  long number;
  return find_line(word, (int)index_of(device), 0, &index, &number);
}

static long state(const char *word, void *device, long otherwise) {
  unsigned index;
  long number;
  return find_line(word, (int)index_of(device), 0, &index, &number) ? number : otherwise;
}

// A number from 0 to 99 that changes with every call and differs between GPUs.
static unsigned vary(void *device) {
  static unsigned calls[MAX_GPUS];
  unsigned index = index_of(device);
  return (10 * index + 7 * ++calls[index % MAX_GPUS]) % 100;
}

static int give(void *device, unsigned *place, unsigned value) {
  if (has("lost", device)) return GPU_IS_LOST;
  *place = value;
  return SUCCESS;
}

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

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index >= num_gpus()) return INVALID_ARGUMENT;
  *device = handle_of(index);
  return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  (void)device;
  snprintf(name, length, "NVIDIA Fake 24GB");
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  if (has("lost", device)) return GPU_IS_LOST;
  memory->total = 24ULL << 30;
  memory->used = 1ULL << 30;
  memory->free = memory->total - memory->used;
  return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
  sleep((unsigned)state("hang", device, 0));
  rates->memory = 10 + index_of(device);
  return give(device, &rates->gpu, (unsigned)state("utilization", device, vary(device)));
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
  return has("plain", device) ? NOT_SUPPORTED : give(device, milliwatts, 300500 + 1000 * index_of(device));
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
  return has("plain", device) ? NOT_SUPPORTED : give(device, milliwatts, 700000);
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
  (void)sensor;
  return give(device, celsius, 50 + index_of(device));
}

int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) {
  return give(device, mhz, kind == 1 ? 1980 : 2619);
}

int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *count) {
  (void)counter;
  if (has("plain", device)) return NOT_SUPPORTED;
  *count = kind == 1 ? 0 : 3;
  return has("lost", device) ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
  *reasons = (unsigned long long)state("throttle", device, 0);
  return has("lost", device) ? GPU_IS_LOST : SUCCESS;
}

int nvmlEventSetCreate(void **set) { *set = handle_of(0); return SUCCESS; }
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
  (void)types, (void)set;
  return has("lost", device) ? GPU_IS_LOST : SUCCESS;
}

int nvmlEventSetWait_v2(void *set, Event *event, unsigned milliseconds) {
  static int delivered;
  unsigned index;
  long number;
  (void)set, (void)milliseconds;
  if (!find_line("xid", -1, delivered, &index, &number)) return TIMEOUT;
  delivered++;
  event->device = handle_of(index);
  event->type = 8;
  event->data = (unsigned long long)number;
  return SUCCESS;
}

int nvmlGpmQueryDeviceSupport(void *device, GpmSupport *support) {
  support->is_supported = !has("old", device) && !has("plain", device);
  return has("lost", device) ? GPU_IS_LOST : SUCCESS;
}

// A sample is the number of its GPU.
int nvmlGpmSampleAlloc(long **sample) { *sample = calloc(1, sizeof **sample); return SUCCESS; }
int nvmlGpmSampleFree(long *sample) { free(sample); return SUCCESS; }

int nvmlGpmSampleGet(void *device, long *sample) {
  *sample = index_of(device);
  return has("lost", device) ? GPU_IS_LOST : SUCCESS;
}

// Every metric is its own number and a quarter, plus ten for each GPU before this one.
int nvmlGpmMetricsGet(GpmRequest *request) {
  if (request->earlier == request->later || *request->earlier != *request->later) return INVALID_ARGUMENT;
  for (unsigned place = 0; place < request->count; place++) {
    request->metrics[place].result = SUCCESS;
    request->metrics[place].value = request->metrics[place].id + 0.25 + 10 * (double)*request->later;
  }
  return SUCCESS;
}
