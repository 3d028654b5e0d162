#!/usr/bin/env bash
# From a bare Linux machine to a running training: makes .venv, installs what is missing, then starts the training.
#
#   ./start_gae_ppo_training.sh [flags of start_gae_ppo_training.py]
#   ./start_gae_ppo_training.sh --gpus 4 [flags]      one process for each of 4 GPUs of this machine (docs/scaling.md)
#   ./start_gae_ppo_training.sh --setup-only
#   ./start_gae_ppo_training.sh --unlocked [flags]    requirements.txt in the place of requirements.lock: for another build of torch
#
# Installs what requirements.lock names, each file by its hash: with uv where it is present, else with pip.
# A later run starts at once: .venv/setup.stamp tells what was installed, unlocked or not, and it stays so. The next run repairs an interrupted setup.
set -Eeuo pipefail
unset PYTHONPATH PYTHONHOME # ROS sets them, and its packages would shadow those of .venv

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/setup.stamp           # what was installed; written last
unfinished=$venv/setup.unfinished # there while packages are being installed
needed_gb=12                      # .venv takes 8 GB; pip holds up to 3 GB of downloads meanwhile
step="start"
python=""
installer=pip # or uv
locked=true

main() {
    if command -v uv >/dev/null; then installer=uv; fi
    local setup_only=false several=false gpus arguments=() start=("$venv/bin/python")
    while (($#)); do
        case $1 in
        --setup-only) setup_only=true ;;
        --unlocked) locked=false ;;
        --gpus=*) several=true gpus=${1#*=} ;;
        --gpus)
            several=true gpus=${2-}
            if (($# > 1)); then shift; fi
            ;;
        *) arguments+=("$1") ;;
        esac
        shift
    done
    if [[ $several == true && ! $gpus =~ ^[1-9][0-9]*$ ]]; then
        echo "error: --gpus takes the number of GPUs, as in --gpus 4" >&2
        exit 2
    fi
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # torchrun, which else dies of the last one
    if [[ $several == true ]]; then start+=(-m torch.distributed.run --standalone --nproc-per-node "$gpus"); fi
    trap 'report_failure $?' ERR
    if [[ -f $stamp && $(<"$stamp") == *unlocked ]]; then locked=false; fi
    is_ready || setup
    if [[ $setup_only == true ]]; then return; fi
    exec "${start[@]}" "$root/start_gae_ppo_training.py" "${arguments[@]}"
}

is_ready() {
    is_installed && [[ -z $(missing_libraries "$venv/bin/python") ]]
}

is_installed() {
    [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]
}

wanted_stamp() (
    cd -- "$root" && sha256sum requirements.lock requirements-libero.txt requirements.txt && "$venv/bin/python" -V 2>/dev/null
    if [[ $locked == false ]]; then echo unlocked; fi
)

setup() {
    step="lock of $venv"
    mkdir -p -- "$venv"
    exec 9>"$venv/setup.lock"
    lock
    : >"$log"
    if is_installed; then python=$venv/bin/python; else find_python; fi
    provide_libraries
    if ! is_installed; then install_packages; fi
    exec 9>&- # else the training would hold the lock
}

lock() { # descriptor 9; not every machine has flock, nor every file system locks
    local status=0
    flock -n 9 2>/dev/null || status=$?
    if ((status == 1)); then
        say "another setup is running for $venv; waiting for it"
        status=0
        flock 9 2>/dev/null || status=$?
    fi
    if ((status)); then
        echo "setup: no lock on $venv (flock: exit status $status): do not start a second setup before this one has ended" >&2
    fi
}

find_python() {
    step="search for Python 3.11"
    local name found=""
    for name in python3.11 python3; do
        if [[ $("$name" -V 2>/dev/null) == "Python 3.11."* ]]; then
            python=$(command -v "$name")
            return
        fi
        found+="$name: $("$name" -V 2>/dev/null || echo "not here"); "
    done
    if [[ $installer == uv ]]; then
        say "Python 3.11 from uv (30 MB to download, seconds)"
        if uv python install 3.11 >>"$log" 2>&1 && python=$(uv python find --system 3.11 2>>"$log"); then return; fi
        found+="uv: cannot provide it ($(tail -n 1 -- "$log")); "
    fi
    die "Python 3.11 is needed, exactly: MuJoCo 2.3.7, whose physics LIBERO's tasks need, has no builds for later ones." \
        "Found ${found%; }. Install 3.11 and run this again, for example with one of" \
        "  sudo apt-get install python3.11 python3.11-venv" \
        "  pip install uv    (this script then takes what uv python install 3.11 provides)" \
        "  conda create -n python311 python=3.11 && conda activate python311"
}

provide_libraries() {
    step="system libraries for rendering"
    local missing
    missing=$(missing_libraries "$python")
    if [[ -z $missing ]]; then return; fi
    case ${MUJOCO_GL:-egl} in
    egl) apt_install "$missing" libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 ;;
    osmesa) apt_install "$missing" libosmesa6 libgl1 libglib2.0-0 ;;
    *) apt_install "$missing" libgl1 libglib2.0-0 ;;
    esac
    missing=$(missing_libraries "$python")
    if [[ $missing ]]; then die "still missing after the installation: $missing"; fi
}

# Prints what MuJoCo (rendering without a screen) and OpenCV cannot load. Loading, unlike a look at ldconfig's list,
# also finds the libraries of conda and of LD_LIBRARY_PATH.
missing_libraries() { # python
    "$1" -I -c '
import ctypes, glob, os

def loads(name):
    try:
        return bool(ctypes.CDLL(name))
    except OSError:
        return False

backend = os.environ.get("MUJOCO_GL") or "egl"
names = ["libGL.so.1", "libgthread-2.0.so.0"]
names += {"egl": ["libEGL.so.1"], "osmesa": ["libOSMesa.so.8"]}.get(backend, [])
missing = [name for name in names if not loads(name)]
folders = [os.environ.get("LIBGL_DRIVERS_PATH") or "/usr/lib/*/dri", "/usr/lib*/dri"]
has_mesa_driver = any(glob.glob(folder + "/*_dri.so") for folder in folders)
if backend == "egl" and not has_mesa_driver and not loads("libEGL_nvidia.so.0"):
    missing.append("an EGL driver")
print(", ".join(missing))
'
}

apt_install() { # what is missing, packages...
    local missing=$1
    shift
    if ! command -v apt-get >/dev/null; then
        die "missing: $missing. Debian's packages for it are $*; install their like, then run this again."
    fi
    if [[ $(id -u) != 0 ]]; then
        die "missing: $missing. Install it, then run this again:" "  sudo apt-get install -y $*"
    fi
    say "apt-get install $* (under a minute)"
    apt-get update >>"$log" 2>&1 || true # a stale list may do; if not, the installation says so
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1
}

install_packages() {
    if [[ ! -f $stamp ]]; then check_disk; fi
    local started=$SECONDS
    if [[ -f $unfinished ]] || ! is_usable; then make_venv; fi
    touch "$unfinished"
    rm -f -- "$stamp"
    say "step 2 of 2: PyTorch, MuJoCo, LIBERO and the rest (3.4 GB to download; a minute with uv, 3 to 10 with pip)"
    if [[ $locked == true ]]; then
        install --require-hashes -r "$root/requirements.lock"
    else
        install --no-deps --require-hashes -r "$root/requirements-libero.txt"
        install -r "$root/requirements.txt"
    fi
    rm -f -- "$unfinished"
    wanted_stamp >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
    say "done in $((SECONDS - started)) s"
}

is_usable() { # the environment that is there, for the installer
    if [[ $installer == uv ]]; then
        [[ $("$venv/bin/python" -V 2>/dev/null) == "Python 3.11."* ]]
    else
        [[ $("$venv/bin/python" -I -m pip --version 2>/dev/null) == *"python 3.11"* ]]
    fi
}

check_disk() {
    step="free disk"
    local free_gb
    free_gb=$(($(df -Pk -- "$venv" | awk 'NR == 2 { print $4 }') / 1000000))
    if ((free_gb < needed_gb)); then
        die "$free_gb GB are free in $root, but the setup needs $needed_gb GB. Make room or move the folder to a larger disk."
    fi
}

make_venv() {
    say "step 1 of 2: Python environment in $venv (seconds)"
    if [[ $installer == pip ]] && ! "$python" -I -c "import ensurepip, venv" 2>>"$log"; then
        apt_install "Python's venv module" python3.11-venv
        say "step 1 of 2: Python environment in $venv (seconds)"
    fi
    find "$venv" -mindepth 1 -maxdepth 1 ! -name "setup.*" -exec rm -rf -- {} + # what an interrupted setup left
    touch "$unfinished"
    if [[ $installer == uv ]]; then
        use_pips_indexes # --seed: with pip, for the optional packages
        uv venv --allow-existing --seed --index-strategy unsafe-best-match --python "$python" "$venv" >>"$log" 2>&1
    else
        "$python" -I -m venv "$venv" >>"$log" 2>&1
    fi
}

install() { # downloads go to the disk that was checked: /tmp is often small
    rm -rf -- "$venv/setup.tmp"
    mkdir -- "$venv/setup.tmp"
    if [[ $installer == uv ]]; then
        use_pips_indexes
        uv pip install --python "$venv/bin/python" --index-strategy unsafe-best-match --no-progress "$@" >>"$log" 2>&1
    else
        TMPDIR=$venv/setup.tmp "$venv/bin/python" -I -m pip install --no-input --progress-bar off "$@" >>"$log" 2>&1
    fi
    rm -rf -- "$venv/setup.tmp"
}

# uv reads neither pip's variables nor its files. UV_TORCH_BACKEND=auto is its own: the build of torch that fits the driver.
use_pips_indexes() {
    local name value index="" extra=""
    while IFS="=" read -r name value; do # global.index-url='https://...', :env:.extra-index-url='...'
        value=${value#\'}
        case $name in
        *.extra-index-url) extra=${value%\'} ;;
        *.index-url) index=${value%\'} ;;
        esac
    done < <("$python" -I -m pip config list 2>/dev/null)
    index=${PIP_INDEX_URL:-$index} extra=${PIP_EXTRA_INDEX_URL:-$extra}
    if [[ $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
    if [[ $extra ]]; then export UV_INDEX=${UV_INDEX:-$extra}; fi
    export UV_CACHE_DIR=${UV_CACHE_DIR:-$venv/setup.tmp} # on the same disk its files become those of .venv, uncopied
}

say() {
    step=$1
    echo "setup: $1" >&2
}

die() { # each argument is a line
    printf 'setup: %s\n' "$1" >&2
    shift
    if (($#)); then printf '%s\n' "$@" >&2; fi
    exit 1
}

report_failure() {
    if ((BASH_SUBSHELL)); then exit "$1"; fi # the shell above reports
    echo "setup: FAILED (exit status $1) in: $step" >&2
    if [[ -s $log ]]; then
        echo "setup: the last lines of $log:" >&2
        tail -n 5 -- "$log" >&2
    fi
    exit "$1"
}

main "$@"
