# shellcheck shell=bash disable=SC2034
# What a site changes, for all scripts here; the environment of sbatch comes first: DLLAMA_START=srun:pmi2 sbatch ...

# The program's Python. `module load` what it needs, and name the virtual environment; empty: python as PATH has it.
# module load python/3.11 mpich
DLLAMA_VENV=${DLLAMA_VENV:-}

# What runs Python where that is not plain python: "apptainer exec /shared/dllama_mpi.sif python".
DLLAMA_PYTHON=${DLLAMA_PYTHON:-python}

# A folder on each node's own disk, for this user alone: compiled kernels, received weights, staged models. It is kept
# for the next job; one that Slurm empties after a job ($TMPDIR on some sites) costs 20 seconds of compiling a job.
DLLAMA_LOCAL=${DLLAMA_LOCAL:-/tmp/dllama_mpi-$(id -un)}

# How ranks are started: mpiexec, srun:pmi2, srun:pmix or another of `srun --mpi=list`; auto: the first that works.
DLLAMA_START=${DLLAMA_START:-auto}

# Where ranks read the model. read: all of them where it lies (a parallel file system). node: each node copies it to its
# own disk, once. root: the first node alone does, and the others receive their slices and keep them there.
DLLAMA_STAGE=${DLLAMA_STAGE:-read}

# How often a job goes back to the queue of its own accord: at all, and after a bad end, such as a node that failed.
DLLAMA_REQUEUES=${DLLAMA_REQUEUES:-100}
DLLAMA_FAILURES=${DLLAMA_FAILURES:-5}

# The host that people log in to, for the tunnel that serve.sbatch prints; empty: the one where sbatch was called.
DLLAMA_LOGIN=${DLLAMA_LOGIN:-}
