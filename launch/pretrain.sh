#!/usr/bin/env bash
# Start ssr-pretrain under torchrun: on this machine, or on this one of several. `pretrain.sh --help` tells how.
# The checkout's .venv is used if there is one.
set -euo pipefail

here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
[[ -x $here/.venv/bin/python ]] && PATH=$here/.venv/bin:$PATH
# shellcheck source-path=SCRIPTDIR source=ranks.sh
source "$here/launch/ranks.sh"

usage() {
  cat <<'HELP'
usage: pretrain.sh [option]... [argument of ssr-pretrain]...

Start a pretraining run with torchrun. On several machines, start it on every one of them, alike but for --node-rank:

  pretrain.sh --config tiny_cpu --output runs/tiny
  pretrain.sh --nodes 2 --node-rank 0 --rendezvous node0:29400 --id first --config ... --output ...

  --nodes N              machines of the run, exactly                    NNODES, PET_NNODES, SLURM_NNODES, or 1
  --ranks-per-node R     ranks of this one: number, gpu, cpu, auto       RANKS, PET_NPROC_PER_NODE, gpu (nodes 1: 2)
With --nodes 2 or more also:
  --rendezvous HOST:PORT a free port of one of them, for training; the   PET_RDZV_ENDPOINT, MASTER_ADDR and MASTER_PORT,
                         next one is for the preflight                   PET_MASTER_ADDR and PET_MASTER_PORT
  --id ID                any word, equal on all, another for each run    RDZV_ID, PET_RDZV_ID, SLURM_JOB_ID
  --node-rank K          0 to N - 1, 0 being HOST; may be left out where NODE_RANK, PET_NODE_RANK
                         HOST is what its machine calls itself
  --local-addr ADDR      name or address that the others know this machine by; its full host name by default
  --join-timeout SECONDS until when all must be there; 600 by default
At will:
  --log-dir DIR          also write what each rank says to files below DIR/NODE
  --max-restarts N       times that the ranks are started anew after a failure, from the last checkpoint; 0; on all
                         machines alike
  --no-preflight         do not run ssr-preflight first; several machines must then start within a minute
  --quick, --expect-ranks N, --hostfile FILE    go to ssr-preflight alone; its --help tells of them
  --dry-run              print the commands and stop
  --help                 this text; ssr-pretrain --help tells of its arguments

An option that is not given is taken from the first of the variables beside it that is set.

SIGTERM, SIGUSR1 and SIGHUP let all ranks save the same step, also when only one machine gets them. Exit status: 0
trained to the end; 75 saved upon such a signal, 130 upon SIGINT, or there was nothing to save yet; 74 not saved (disk
full); 69 a rank was lost or stalled: all four go on with --resume. 1 another failure of a rank, of the preflight or to
meet; 2 wrong options; 128 + N signal N ended it at once, as a second signal does.
HELP
}

fail() {
  say "$1"
  exit 2
}

# The options, wherever they stand; `arguments` is what is left for ssr-pretrain.
read_options() {
  local option
  while (($#)); do
    option=${1%%=*}
    case $option in
      --nodes | --node-rank | --ranks-per-node | --rendezvous | --id | --local-addr | --join-timeout | --log-dir | --max-restarts | --expect-ranks | --hostfile)
        if [[ $1 == *=* ]]; then
          set -- "$option" "${1#*=}" "${@:2}"
        fi
        [[ -n ${2:-} && $2 != --* ]] || fail "$option needs a value"
        case $option in
          --expect-ranks | --hostfile) checks+=("$option" "$2") ;;
          *) given[${option#--}]=$2 ;;
        esac
        shift 2
        ;;
      --quick) checks+=(--quick) && shift ;;
      --no-preflight) preflight= && shift ;;
      --dry-run) dry_run=yes && shift ;;
      --help | -h) usage && exit 0 ;;
      --)
        arguments+=("${@:2}")
        break
        ;;
      *) arguments+=("$1") && shift ;;
    esac
  done
}

# The first of the variables named that is set and not empty.
from_environment() {
  local name
  for name in "$@"; do
    if [[ -n ${!name:-} ]]; then
      printf '%s' "${!name}"
      return
    fi
  done
}

# HOST:PORT, or the half of it that is there, from a pair of variables.
joined() {
  local host=${!1:-} port=${!2:-}
  if [[ -n $host$port ]]; then
    printf '%s' "$host:$port"
  fi
}

number() { # NAME VALUE LEAST
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    fail "$1 = $2; allowed: whole numbers, at least $3"
  fi
}

resolve() {
  nodes=${given[nodes]:-$(from_environment NNODES PET_NNODES SLURM_NNODES)}
  node_rank=${given[node-rank]:-$(from_environment NODE_RANK PET_NODE_RANK)}
  if [[ -z $nodes ]]; then
    [[ -z ${given[rendezvous]:-}${given[id]:-}${given[node-rank]:-} ]] ||
      fail "--rendezvous, --id and --node-rank are for several machines: give --nodes N too"
    [[ ${WORLD_SIZE:-1} == 1 ]] || fail "WORLD_SIZE = $WORLD_SIZE, but nothing tells of how many machines: give --nodes N"
    nodes=1
  fi
  number --nodes "$nodes" 1
  if [[ -n $node_rank ]]; then
    number --node-rank "$node_rank" 0
    ((node_rank < nodes)) || fail "--node-rank = $node_rank; allowed: 0 to $((nodes - 1)), for --nodes $nodes"
  fi
  ranks=${given[ranks-per-node]:-$(from_environment RANKS PET_NPROC_PER_NODE)}
  : "${ranks:=$( ((nodes == 1)) && echo 2 || echo gpu)}"
  case $ranks in
    auto | gpu | cpu) ;;
    *) number --ranks-per-node "$ranks" 1 ;;
  esac
  restarts=${given[max-restarts]:-0}
  number --max-restarts "$restarts" 0
  join_timeout=${given[join-timeout]:-600}
  number --join-timeout "$join_timeout" 1
  if ((nodes > 1)); then
    resolve_rendezvous
  fi
}

resolve_rendezvous() {
  rendezvous=${given[rendezvous]:-$(from_environment PET_RDZV_ENDPOINT)}
  : "${rendezvous:=$(joined MASTER_ADDR MASTER_PORT)}"
  : "${rendezvous:=$(joined PET_MASTER_ADDR PET_MASTER_PORT)}"
  [[ -n $rendezvous ]] ||
    fail "--nodes $nodes needs a place to meet: give --rendezvous HOST:PORT, or set MASTER_ADDR and MASTER_PORT, the same on every machine"
  port=${rendezvous##*:}
  if [[ ! $rendezvous =~ ^[^:].*:[1-9][0-9]{0,4}$ ]] || ((port >= 65535)); then
    fail "--rendezvous (or MASTER_ADDR:MASTER_PORT) = $rendezvous; allowed: HOST:PORT with a port from 1 to 65534"
  fi
  id=${given[id]:-$(from_environment RDZV_ID PET_RDZV_ID SLURM_JOB_ID)}
  [[ -n $id ]] ||
    fail "--nodes $nodes needs --id ID (or RDZV_ID): any word, the same on every machine and another for each run"
  [[ $id =~ ^[A-Za-z0-9._-]+$ ]] || fail "--id = $id; allowed: letters, digits, dot, underscore and hyphen"
}

# Sets `command` to torchrun and its options. With several machines: what is added to port and id, and the seconds
# that one waits for another that answers no more, or has not begun to listen.
torchrun_command() { # PORT_OFFSET ID_SUFFIX PATIENCE
  local name=${given[local-addr]:-} timeouts=join_timeout=$join_timeout,read_timeout=$3
  command=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
  if [[ -n ${given[log-dir]:-} ]]; then
    # torchrun's own prefix has the number within the machine only.
    # shellcheck disable=SC2016  # torchrun fills it in
    command+=(TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}]: ')
  fi
  command+=(torchrun --nnodes "$nodes" --nproc-per-node "$ranks"
    # Its own would also start those anew that have saved and left; `train` does it.
    --max-restarts 0 --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$shutdown_timeout")
  if ((nodes == 1)); then
    command+=(--standalone)
  else
    if [[ -n $node_rank ]]; then
      # Otherwise torchrun compares names, and finds no host where HOST is an alias or a second address.
      timeouts+=,is_host=$((node_rank == 0))
    fi
    command+=(--rdzv-backend c10d --rdzv-endpoint "${rendezvous%:*}:$((port + $1))" --rdzv-id "$id-$2" --rdzv-conf "$timeouts")
  fi
  if [[ -n $name ]]; then
    command+=(--local-addr "$name")
  fi
  if [[ -n ${given[log-dir]:-} ]]; then
    command+=(--log-dir "${given[log-dir]}/${node_rank:+node_}${node_rank:-$HOSTNAME}" --tee 3)
  fi
}

# Machines may start it far apart, and leave it together.
preflight_command() {
  torchrun_command 1 preflight "$join_timeout"
  command+=(-m ssr_deepspeed.preflight "${checks[@]}" "${arguments[@]}")
}

training_command() { # ATTEMPT
  local argument resume=--resume resumed=()
  torchrun_command 0 "$1" "$((join_timeout < 60 ? join_timeout : 60))"
  if [[ -z $begun ]]; then
    command+=(-m ssr_deepspeed.pretrain "${arguments[@]}")
    return
  fi
  # The folder holds this run now: it goes on from its last checkpoint.
  for argument in "${arguments[@]}"; do
    case $argument in
      --overwrite) continue ;;
      # `weights` too: there may be no checkpoint of the new layout yet, and from one of its own it is exact.
      --resume | --resume=*) resume= ;;
    esac
    resumed+=("$argument")
  done
  command+=(-m ssr_deepspeed.pretrain "${resumed[@]}" ${resume:+"$resume"})
}

train() {
  local attempt=0 status=0 since=$SECONDS
  if ((nodes > 1)); then
    say "waiting at most $join_timeout s until all $nodes machines are at $rendezvous"
    warn_of_loopback
    check_place || return
  fi
  if [[ -n $preflight ]]; then
    preflight_command
    run_ranks || status=$?
    if ((status)); then
      tell_unmet
      return "$status"
    fi
  fi
  while :; do
    status=0
    training_command "$attempt"
    run_ranks || status=$?
    [[ -z $stopped ]] || break
    if [[ -n $unmet ]] && ((attempt && SECONDS - since < join_timeout)); then
      # It came upon a machine that had yet to end the attempt before, and that has now left with its meeting place.
      sleep 3 || true
      continue
    fi
    # What may pass. An error before training has begun would come again.
    [[ $status == 69 || ($status == 1 && -n $trained) ]] || break
    ((attempt < restarts)) || break
    attempt=$((attempt + 1)) since=$SECONDS
    say "exit status $status; restart $attempt of $restarts"
  done
  tell_unmet
  return "$status"
}

print_commands() {
  if [[ -n $preflight ]]; then
    preflight_command
    printf '%q ' "${command[@]}"
    echo
  fi
  training_command 0
  printf '%q ' "${command[@]}"
  echo
}

# bash reads what is in braces to its end: a script changed while a run lasts would otherwise go on in its new text.
{
  declare -A given=()
  arguments=() checks=() preflight=yes dry_run=''
  id=none port=0 rendezvous=
  read_options "$@"
  resolve
  if [[ -n $dry_run ]]; then
    print_commands
    exit
  fi
  SSR_EXIT_FILE=$(mktemp)
  export SSR_EXIT_FILE
  trap 'rm -f "$SSR_EXIT_FILE" "$SSR_EXIT_FILE".*' EXIT
  for signal in TERM INT USR1; do
    # shellcheck disable=SC2064  # its name now
    trap "pass_on $signal" "$signal"
  done
  trap : PIPE # whoever read this is gone
  trap 'pass_on TERM' HUP # the terminal is gone; torchrun, in a group of its own, does not hear of it
  train
  exit
}
