#!/usr/bin/env bash
# Start ssr-pretrain under torchrun: on this machine, or on this one of several. `pretrain.sh --help` tells how.
# The checkout's .venv is used if there is one.
set -euo pipefail

here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -x $here/.venv/bin/python ]] && PATH=$here/.venv/bin:$PATH

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
  printf 'pretrain.sh: %s\n' "$1" >&2
  exit 2
}

# The options, wherever they stand; `arguments` is what is left for ssr-pretrain.
read_options() {
  local option
  while (($#)); do
    option=${1%%=*}
    case $option in
      --nodes | --node-rank | --ranks-per-node | --rendezvous | --id | --local-addr | --join-timeout | --log-dir | --max-restarts)
        if [[ $1 == *=* ]]; then
          set -- "$option" "${1#*=}" "${@:2}"
        fi
        [[ -n ${2:-} && $2 != --* ]] || fail "$option needs a value"
        given[${option#--}]=$2
        shift 2
        ;;
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
  command+=(-m ssr_deepspeed.preflight "${arguments[@]}")
}

training_command() { # ATTEMPT
  torchrun_command 0 "$1" "$((join_timeout < 60 ? join_timeout : 60))"
  if (($1)); then
    resumed_arguments
    command+=(-m ssr_deepspeed.pretrain "${resumed[@]}")
  else
    command+=(-m ssr_deepspeed.pretrain "${arguments[@]}")
  fi
}

# What a restart does: the same run, from its last checkpoint.
resumed_arguments() {
  local argument resume=--resume
  resumed=()
  for argument in "${arguments[@]}"; do
    case $argument in
      --overwrite) continue ;;
      # `weights` too: there may be no checkpoint of the new layout yet, and from one of its own it is exact.
      --resume | --resume=*) resume= ;;
    esac
    resumed+=("$argument")
  done
  resumed+=(${resume:+"$resume"})
}

# The name of many machines is 127.0.1.1 to themselves, at which gloo would have the others look for them.
warn_of_loopback() {
  if [[ -z ${GLOO_SOCKET_IFNAME:-} && $(getent hosts "$HOSTNAME" || true) == @(127.|::1)* ]]; then
    printf 'pretrain.sh: %s is a loopback address here; set GLOO_SOCKET_IFNAME, by which ranks meet also where NCCL does the work\n' "$HOSTNAME" >&2
  fi
}

# What torchrun tells after its patience has ended, or never.
check_place() {
  local problem
  problem=$(
    python3 - "${rendezvous%:*}" "$port" "$node_rank" <<'PYTHON' || true
import socket, sys

host, port, rank = sys.argv[1].strip("[]"), int(sys.argv[2]), sys.argv[3]
try:
    socket.getaddrinfo(host, port)
    for own in (port, port + 1) if rank == "0" else ():
        try:
            socket.create_server(("", own)).close()
        except OSError as error:
            print(f"port {own} of this machine, of --rendezvous or the next, cannot be used ({error.strerror}): name another")
except OSError as error:
    print(f"the host of --rendezvous, {host}, cannot be found from here ({error.strerror})")
PYTHON
  )
  [[ -z $problem ]] || fail "$problem"
}

# Run a command in a process group of its own, so that a Ctrl-C reaches it once, by way of the trap. Its exit status.
run() {
  local status=0 watcher
  set -m
  "$@" &
  child=$!
  set +m
  end_when_ranks_have &
  watcher=$!
  disown "$watcher" # bash would tell of its end
  if [[ -n $stopped ]]; then
    kill -s "$stopped" "$child"
  fi
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a signal ends it before the command ends
  done
  wait "$child" || status=$?
  child=
  kill -KILL "$watcher" 2>/dev/null || true
  return "$status"
}

# On a machine that is cut off, torchrun waits for its meeting place as long as TCP does, a quarter of an hour, and
# hears no signal. Ranks leave their status just before they end; torchrun needs 30 s at most to end those that cannot.
# Nor does it give up where something else listens at the place to meet.
end_when_ranks_have() {
  local left=90 patience=$((join_timeout + 60))
  trap '' TERM INT USR1 HUP # they come to the whole group, and a subshell has not its parent's traps
  while ((left > 0 && patience > 0)); do
    sleep 1 >/dev/null 2>&1
    kill -0 "$child" 2>/dev/null || return 0
    [[ ! -s $SSR_EXIT_FILE ]] || left=$((left - 1))
    if ((nodes > 1)) && [[ -d /proc/$child/task && ! -e $SSR_EXIT_FILE.met ]]; then
      # torchrun starts its ranks when all machines are there.
      if [[ -n $(ranks_of "$child") ]]; then : >"$SSR_EXIT_FILE.met"; else patience=$((patience - 1)); fi
    fi
  done
  if ((patience > 0)); then
    printf 'pretrain.sh: the ranks ended 90 s ago, and torchrun waits for another machine: ending it\n' >&2
  fi
  # shellcheck disable=SC2046  # process ids
  kill -KILL $(ranks_of "$child") "$child" 2>/dev/null || true
}

ranks_of() { # PROCESS
  cat "/proc/$1/task/"*/children 2>/dev/null || true
}

# Within five seconds once: Slurm tells every process of a step, and a third one tears torchrun from its ranks.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  if ((SECONDS - ${passed[$1]:--9} > 5)); then
    passed[$1]=$SECONDS
    [[ -z $stopped ]] || again=yes
    stopped=$1
    : "${stopped_at:=$SECONDS}"
    if [[ -n $child ]]; then
      kill -s "$1" "$child" 2>/dev/null || true
    fi
  fi
}

# The ranks' own exit status, which torchrun replaces by 1. They leave `.begun` beside it when there is something to lose.
run_ranks() {
  local status=0 began=$SECONDS
  : >"$SSR_EXIT_FILE"
  rm -f "$SSR_EXIT_FILE.begun" "$SSR_EXIT_FILE.met"
  run "${command[@]}" || status=$?
  if [[ -s $SSR_EXIT_FILE ]]; then
    status=$(<"$SSR_EXIT_FILE")
    if [[ $status == 75 && -z $stopped && ! -e $SSR_EXIT_FILE.begun ]]; then
      # Of those that torchrun ended: a scheduler would start it again and again.
      printf 'pretrain.sh: a rank ended before training had begun, and torchrun ended the others\n' >&2
      status=1
    fi
    explain "$status"
  elif [[ $status != 0 && -z $stopped && ! -e $SSR_EXIT_FILE.met ]] && ((nodes > 1 && SECONDS - began >= join_timeout)); then
    printf 'pretrain.sh: the %s machines have not met at %s in %s s: are --id (here %s), --nodes, --rendezvous and --no-preflight alike on all, --node-rank 0 on the machine of --rendezvous, and its ports open?\n' \
      "$nodes" "$rendezvous" "$join_timeout" "$id" >&2
    status=1
  elif [[ $status == 1 && -z $again && -e $SSR_EXIT_FILE.begun ]]; then
    printf 'pretrain.sh: a rank was killed, or crashed, and the others of this machine left no word\n' >&2
    status=69
  elif [[ -n $stopped && $status != 0 ]]; then
    silent_end "$status" || status=$?
  fi
  return "$status"
}

# The last line on every machine: rank 0 has said more, on its own.
explain() { # STATUS
  case $1 in
    69) printf 'pretrain.sh: exit status 69: a rank was lost or stalled; go on with --resume\n' >&2 ;;
    74) printf 'pretrain.sh: exit status 74: the last checkpoint could not be written; make room and go on with --resume\n' >&2 ;;
    75 | 130) printf 'pretrain.sh: exit status %s: stopped by a signal, nothing is lost; go on with --resume\n' "$1" >&2 ;;
  esac
}

# The status of a run that a signal has ended and whose ranks have left none. Ranks leave one however they end, but for
# those that a signal kills while Python still starts, and those that are killed with -KILL or never came to be.
silent_end() { # STATUS_OF_TORCHRUN
  local number after=$((SECONDS - stopped_at))
  number=$(kill -l "$stopped")
  if [[ -n $again ]]; then
    printf 'pretrain.sh: SIG%s after another signal ended the run at once\n' "$stopped" >&2
    return $((128 + number))
  elif (($1 != 1 && $1 != 128 + number)); then
    printf 'pretrain.sh: after SIG%s torchrun ended with %s, and its ranks left no word\n' "$stopped" "$1" >&2
    return "$1"
  elif ((after >= shutdown_timeout)); then # torchrun has killed them
    printf 'pretrain.sh: no rank has saved in the %s s since SIG%s; go on with --resume\n' "$after" "$stopped" >&2
    return 69
  fi
  printf 'pretrain.sh: SIG%s came before there was anything to save; go on with --resume\n' "$stopped" >&2
  [[ $stopped == INT ]] && return 130
  return 75
}

train() {
  local attempt status=0
  if ((nodes > 1)); then
    printf 'pretrain.sh: waiting at most %s s until all %s machines are at %s\n' "$join_timeout" "$nodes" "$rendezvous" >&2
    warn_of_loopback
    check_place
  fi
  if [[ -n $preflight ]]; then
    preflight_command
    run_ranks || return
  fi
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    if ((attempt)); then
      printf 'pretrain.sh: exit status %s; restart %s of %s\n' "$status" "$attempt" "$restarts" >&2
    fi
    status=0
    training_command "$attempt"
    run_ranks || status=$?
    case $status in
      1 | 69) [[ -z $stopped ]] || break ;; # a failure that may pass
      *) break ;;
    esac
  done
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
  declare -A given=() passed=()
  arguments=() preflight=yes dry_run='' child='' stopped='' stopped_at='' again=''
  shutdown_timeout=600 # seconds that ranks have to save, until torchrun kills them
  id=none port=0 rendezvous=
  read_options "$@"
  resolve
  if [[ -n $dry_run ]]; then
    print_commands
    exit
  fi
  SSR_EXIT_FILE=$(mktemp)
  export SSR_EXIT_FILE
  trap 'rm -f "$SSR_EXIT_FILE" "$SSR_EXIT_FILE.begun" "$SSR_EXIT_FILE.met"' EXIT
  for signal in TERM INT USR1; do
    # shellcheck disable=SC2064  # its name now
    trap "pass_on $signal" "$signal"
  done
  trap 'pass_on TERM' HUP # the terminal is gone; torchrun, in a group of its own, does not hear of it
  train
  exit
}
