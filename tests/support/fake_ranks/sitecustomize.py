# SPDX-License-Identifier: Apache-2.0
"""Makes a worker rank 0 of FAKE_RANKS ranks, whose others are not there, and prints what it sends in its third step.

Python imports this module at its start, where this folder is on its path. The worker's other rank ends at once. Nothing
arrives from ranks that are not there: the numbers are wrong, and their sizes right.
"""

import json
import os
import sys

RANKS_A_HOST = 8
SEND_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")
COUNTED_STEP = 2  # from 0: memory and process groups are made before


class PatchAfterImports:
    """A finder of modules that finds none, and patches the worker once torch is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "llm_trainer.export.manifest":  # which the story of a job imports last but torch
            sys.meta_path.remove(self)
            join_fake_ranks(int(os.environ["FAKE_RANKS"]))


def join_fake_ranks(num_ranks):
    """Have torch.distributed talk to nobody, and count what it would send."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    begin, make_group = dist.init_process_group, dist.new_group

    def begin_fake(*_, **__):
        begin("fake", store=FakeStore(), rank=0, world_size=num_ranks)

    def make_fake_group(ranks=None, *_, **__):
        return make_group(ranks, backend="fake")

    def gather_objects(gathered, own, group=None):
        counted.objects += 1
        gathered[:] = [own] * len(gathered)

    counted = make_counter()
    for module in (dist, c10d):
        module.init_process_group, module.new_group = begin_fake, make_fake_group
        module.all_gather_object = gather_objects
        module.broadcast_object_list = lambda *_, **__: None
    count_step(counted, num_ranks)


def make_counter():
    """A mode that counts the collectives of a step, and the bytes that a ring moves for them."""
    from collections import Counter

    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sent(TorchDispatchMode):
        calls, size, objects = Counter(), Counter(), 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if DTensor in types:
                return NotImplemented  # its own collectives come after it
            namespace, name = function._schema.name.split("::")
            out = function(*args, **(kwargs or {}))
            if namespace in ("c10d", "_c10d_functional") and name not in SEND_NOTHING:
                tensors = [each for each in tree_leaves((args, out)) if isinstance(each, torch.Tensor)]
                self.calls[name] += 1
                self.size[name] += max(tensor.nbytes for tensor in tensors)
            return out

    return Sent()


def count_step(counted, num_ranks):
    """Print what the counted step has sent, its CPU time and the process's memory, and end the worker."""
    import resource
    import time

    from transformers import Trainer

    steps = iter(range(COUNTED_STEP + 2))
    get_batches, began = Trainer.get_batch_samples, []

    def begin_step(self, *args, **kwargs):
        step = next(steps)
        if step == COUNTED_STEP:
            counted.calls.clear(), counted.size.clear()
            began.extend([time.process_time(), counted.objects])
            counted.__enter__()
        elif step > COUNTED_STEP:
            found = {"calls": counted.calls, "bytes": counted.size, "objects": counted.objects - began[1]}
            found["seconds"] = time.process_time() - began[0]
            found["memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"SENT {json.dumps(found)}", flush=True)
            os._exit(0)
        return get_batches(self, *args, **kwargs)

    Trainer.get_batch_samples = begin_step


# One of the launchers of workers names the worker, too.
if [word for word in sys.orig_argv if word.startswith("llm_trainer.")] == ["llm_trainer.worker"]:
    if os.environ["RANK"] != "0":
        os._exit(0)
    os.environ |= {"WORLD_SIZE": os.environ["FAKE_RANKS"], "LOCAL_WORLD_SIZE": str(RANKS_A_HOST)}
    sys.meta_path.insert(0, PatchAfterImports())
