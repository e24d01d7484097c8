# shellcheck shell=bash disable=SC2034,SC2154 # variables of the scripts that source this, and for them
# What the batch scripts share: how this job's ranks are started, what its nodes keep, how it ends. Sourced; $here is
# the folder of this file.

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script; give it to Slurm: sbatch $0"
# shellcheck source=slurm/site.sh
. "$here/site.sh"
if [ -n "$DLLAMA_VENV" ]; then
  [ -r "$DLLAMA_VENV/bin/activate" ] || die "DLLAMA_VENV=$DLLAMA_VENV has no bin/activate; make it at the login node"
  # shellcheck disable=SC1091
  . "$DLLAMA_VENV/bin/activate"
fi
case $DLLAMA_LOCAL in /*) ;; *) die "DLLAMA_LOCAL=$DLLAMA_LOCAL is not an absolute path" ;; esac
case $DLLAMA_STAGE in read | node | root) ;; *) die "DLLAMA_STAGE=$DLLAMA_STAGE; give read, node or root" ;; esac
read -ra python <<<"$DLLAMA_PYTHON"
command -v "${python[0]}" >/dev/null || die "no ${python[0]} on $(hostname); set DLLAMA_VENV or DLLAMA_PYTHON in $here/site.sh"
export DLLAMA_LOCAL HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # compute nodes ask nobody outside
rank=$here/rank.sh

# ---- the job's nodes, and its ranks and cores on each

nodes=$SLURM_JOB_NUM_NODES
per_node=${SLURM_NTASKS_PER_NODE:-1}
ranks=$((nodes * per_node))
cpus=${SLURM_CPUS_PER_TASK:-}
if [ -z "$cpus" ]; then # all of the node that has the fewest: "64(x3),32"
  fewest=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -1)
  cpus=$((fewest / per_node))
  [ "$cpus" -ge 1 ] || die "--ntasks-per-node=$per_node, but a node gives $fewest cores; take fewer ranks a node"
fi

# ---- starting ranks

# `launch NODES` sets `launcher`, what comes before the ranks' command; `how` says in which way: mpiexec or srun:PLUGIN.
launch() {
  local n=$(($1 * per_node)) bind=none
  [ "$per_node" = 1 ] || bind=numa
  case $how in
    mpiexec)
      # Its own srun starts one process a node, which needs the cores of all ranks there.
      launcher=(env "SRUN_CPUS_PER_TASK=$((per_node * cpus))" "$mpiexec" -n "$n")
      case $library in
        "Open MPI"*) launcher+=(--map-by "ppr:$per_node:node" --bind-to "$bind") ;;
        *) launcher+=(-ppn "$per_node" -bind-to "$bind") ;;
      esac
      ;;
    srun:*)
      launcher=(srun "--mpi=${how#srun:}" "--nodes=$1" "--ntasks=$n" "--ntasks-per-node=$per_node"
        "--cpus-per-task=$cpus" --kill-on-bad-exit=1)
      ;;
  esac
}

offered() { srun --mpi=list 2>&1 | grep -v '^MPI plugin types' | sed 's/.*: *//' | tr ',' '\n' | awk '{print $1}' | sort -u; }

# Whether all ranks find each other, started in this way, and nothing is said of broken messages: MPICH's start through
# srun --mpi=pmi2 may go well once, and then not.
works() {
  launch "$nodes"
  timeout 120 "${launcher[@]}" "$rank" "${python[@]}" -c '
import sys
from dllama_mpi.parallel.group import connect
group = connect()
group.allgather(None)
sys.exit(group.size != int(sys.argv[1]))' "$ranks" >"$scratch" 2>&1 && ! grep -q 'mpi/pmi2: .*request' "$scratch"
}

# What it said last, in parentheses, if anything.
last_words() {
  local line
  line=$(grep -v '^ *[-=*]*$' "$scratch" | tail -n 1)
  [ -z "$line" ] || printf ' (%s)' "$line"
}

choose() {
  local script='import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 "))'
  library=$("${python[@]}" -c "$script" 2>"$scratch") ||
    die "$DLLAMA_PYTHON cannot load MPI: $(tail -n 1 "$scratch"); pip install mpi4py mpich, or load the site's module"
  library=${library/ Version:*[[:space:]]/ }
  mpiexec=$(dirname "$(command -v "${python[0]}")")/mpiexec
  [ -x "$mpiexec" ] || mpiexec=$(command -v mpiexec) || mpiexec=
  local list all
  list=$(offered)
  all=$(xargs <<<"$list")
  case $DLLAMA_START in
    auto)
      local candidates=()
      [ -z "$mpiexec" ] || candidates+=(mpiexec)
      local plugins="pmi2 pmix cray_shasta"
      case $library in "Open MPI"*) plugins="pmix pmi2" ;; esac
      for how in $plugins; do
        ! grep -qx "$how" <<<"$list" || candidates+=("srun:$how")
      done
      for how in "${candidates[@]}"; do
        if works; then return; fi
        say "$how does not start $library$(last_words)"
      done
      die "nothing here starts $library: tried ${candidates[*]:-nothing}, srun --mpi=list offers $all; see $here/README.md"
      ;;
    mpiexec) [ -n "$mpiexec" ] || die "DLLAMA_START=mpiexec, but there is none beside ${python[0]} or on PATH" ;;
    srun:*)
      grep -qx "${DLLAMA_START#srun:}" <<<"$list" ||
        die "DLLAMA_START=$DLLAMA_START, but srun --mpi=list offers $all; give one of them, or auto"
      ;;
    *) die "DLLAMA_START=$DLLAMA_START; give auto, mpiexec or srun:PLUGIN" ;;
  esac
  how=$DLLAMA_START
  works || die "DLLAMA_START=$how does not start $library: its ranks do not find each other; leave it at auto," \
    "or use srun:pmi2 with MPICH, srun:pmix with Open MPI$(last_words)"
}

# ---- the model

# Run a part of rank.sh once a node, on so many nodes.
on_nodes() {
  srun --mpi=none "--nodes=$1" "--ntasks=$1" --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 "$rank" "${@:2}"
}

# Set `model` to where ranks find a model: the path or name itself, or its copy on the nodes' own disks.
stage() {
  model=$1
  if [ "$DLLAMA_STAGE" = read ] || [ "$model" = demo ]; then return; fi
  [ -e "$model" ] || die "DLLAMA_STAGE=$DLLAMA_STAGE copies a folder or file, and $model is none; give its path, or set read"
  model=$(realpath "$model")
  local count=$nodes
  [ "$DLLAMA_STAGE" = node ] || count=1
  on_nodes "$count" --stage "$model" || die "$model could not be copied to $DLLAMA_LOCAL on all nodes"
  model=$DLLAMA_LOCAL/models$model
}

# ---- the end

# Run a command, and on SIGTERM, which Slurm sends before the time limit, have it drain. Returns its status; `drained`
# says whether the signal came.
run() {
  drained=
  local status=143 interrupted=1
  rm -f "$root"
  trap 'interrupted=1 drained=1; say "job $SLURM_JOB_ID: told to end; draining"; drain' TERM
  "$@" &
  child=$!
  while [ -n "$interrupted" ] && [ "$status" -gt 128 ]; do # a signal ends the waiting, not the command
    interrupted=
    status=0
    wait "$child" || status=$?
  done
  trap - TERM
  rm -f "$root"
  return "$status"
}

# Rank 0 alone is told: launchers pass a signal on in ways of their own. It runs on this node, the job's first.
drain() { kill -TERM "$(cat "$root" 2>/dev/null || echo "$child")" 2>/dev/null || true; }

# Give this job back to the queue, as it was, and say why.
requeue() {
  local times=${SLURM_RESTART_COUNT:-0}
  [ "$times" -lt "$DLLAMA_REQUEUES" ] ||
    die "job $SLURM_JOB_ID was requeued $times times (DLLAMA_REQUEUES): $*; submit it again to go on"
  say "job $SLURM_JOB_ID: $*; back to the queue"
  scontrol requeue "$SLURM_JOB_ID" || die "this site does not requeue job $SLURM_JOB_ID; submit it again to go on"
  sleep 120 # Slurm ends this script
}

# The same after a bad end, which may repeat itself: no more than a few times.
requeue_failed() {
  printf . >>"$failures"
  [ "$(wc -c <"$failures")" -le "$DLLAMA_FAILURES" ] || {
    rm -f "$failures"
    die "job $SLURM_JOB_ID: $*; it was started again $DLLAMA_FAILURES times (DLLAMA_FAILURES)"
  }
  requeue "$@"
}

scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
kept=$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID # before the names of this job's files
failures=$kept.failures
root=$DLLAMA_LOCAL/root-$SLURM_JOB_ID # rank 0's process id
export SLURM_EXPORT_ENV=ALL # whatever sbatch --export said: ranks need what is set here
choose
launch "$nodes"
case $how in mpiexec) starter=$mpiexec ;; *) starter="srun --mpi=${how#srun:}" ;; esac
say "job $SLURM_JOB_ID${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID)}," \
  "start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date +%FT%T%z): $nodes nodes ($SLURM_JOB_NODELIST)," \
  "$ranks ranks, $per_node a node, $cpus cores each; $library by $starter; caches in $DLLAMA_LOCAL"
cluster=(--nthreads "$cpus" --cache-dir "$DLLAMA_LOCAL/weights")
program=("$rank" "${python[@]}" -m dllama_mpi)
