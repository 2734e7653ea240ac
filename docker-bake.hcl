# What is built, from what, under which name. `make build|test|lint|lock|lock-check` are these targets.
# Needs buildx 0.13 or newer. Nothing enters a build but images/<image> and the contexts named here, so .env never can.

# Where images go and under which tag; `make push` sets both: REGISTRY=docker.io/you/ VERSION=1.2.3
variable "REGISTRY" { default = "" }
variable "VERSION" { default = "local" }
# What is attested of an image that is pushed: provenance, sbom, or both with a comma between; `make push` sets it. Not
# every builder can attest, so nothing is unless it is asked for.
variable "ATTESTATIONS" { default = "" }
# The image that lists an image's contents for the SBOM; empty: BuildKit's own choice.
variable "SBOM_SCANNER" { default = "" }
# The base images; empty keeps the defaults of the Dockerfiles, pinned by digest.
variable "PYTHON_BASE" { default = "" }
variable "TORCH_BASE" { default = "" }
# The torch that is installed where no TORCH_BASE brings one.
variable "TORCH_VERSION" { default = "2.13.0" }
# The flash-attention kernel of the worker for GPUs, NAME@COMMIT of a kernel repository on the Hub; empty: none, with a
# warning in the build and at the worker's start. Set it for a GPU: docs/worker.md says to what.
variable "FLASH_KERNEL" { default = "" }
# What `worker-baked` holds; both must be set, MODEL_REVISION to a commit. HF_TOKEN of the environment is its secret.
variable "MODEL_ID" { default = "" }
variable "MODEL_REVISION" { default = "" }
# Another hub with the same interface, for what these two download.
variable "HF_ENDPOINT" { default = "" }
# The image of vLLM that `worker-vllm` builds on; empty: the Dockerfile's.
variable "VLLM_BASE" { default = "" }
# A hash of the image's input files, set by scripts/run to know later whether a build is due.
variable "INPUTS" { default = "" }

target "_common" {
  args = {
    PYTHON_BASE = PYTHON_BASE != "" ? PYTHON_BASE : null
    TORCH_BASE  = TORCH_BASE != "" ? TORCH_BASE : null
    TORCH_VERSION = TORCH_VERSION
  }
  labels = {
    "org.opencontainers.image.title" = "open-synthesis"
    "org.open-synthesis.inputs"      = INPUTS
  }
}

group "default" {
  targets = ["image"]
}

# Each image, and the variants that share its folder: folder, target of the Dockerfile.
target "image" {
  name = item.image
  matrix = {
    item = [
      { image = "client", folder = "client", stage = "runtime" },
      { image = "client-full", folder = "client", stage = "full" },
      { image = "worker", folder = "worker", stage = "runtime" },
      { image = "worker-slim", folder = "worker", stage = "slim" },
      { image = "ops", folder = "ops", stage = "runtime" },
      { image = "ablate", folder = "ablate", stage = "runtime" },
    ]
  }
  inherits = ["_common"]
  context  = "images/${item.folder}"
  contexts = {
    common  = "scripts/common"
    scripts = "scripts"
    prompts = "prompts"
  }
  # RunPod runs amd64 only; what runs on your own machine is built for it.
  platforms = contains(["worker", "ablate"], item.image) ? ["linux/amd64"] : []
  args = {
    FLASH_KERNEL = item.image == "worker" ? FLASH_KERNEL : null
    HF_ENDPOINT  = item.image == "worker" && HF_ENDPOINT != "" ? HF_ENDPOINT : null
  }
  target = item.stage
  tags   = ["${REGISTRY}open-synthesis-${item.image}:${VERSION}"]
  # mode=max: with the build's arguments, so none of them may ever be a secret.
  attest = concat(
    contains(split(",", ATTESTATIONS), "provenance") ? ["type=provenance,mode=max"] : [],
    contains(split(",", ATTESTATIONS), "sbom") ? ["type=sbom${SBOM_SCANNER != "" ? ",generator=${SBOM_SCANNER}" : ""}"] : [],
  )
}

# The worker with its model inside: HF_TOKEN=… MODEL_ID=… MODEL_REVISION=… docker buildx bake worker-baked
target "worker-baked" {
  inherits = ["worker"]
  target   = "baked"
  args = {
    MODEL_ID       = MODEL_ID
    MODEL_REVISION = MODEL_REVISION
  }
  secret = ["id=hf_token,env=HF_TOKEN"]
  tags   = ["${REGISTRY}open-synthesis-worker-baked:${VERSION}"]
}

# The worker with vLLM, on vLLM's own image: 9 GB to pull, and built only by name: docker buildx bake worker-vllm
target "worker-vllm" {
  inherits = ["worker"]
  target   = "vllm"
  args     = { VLLM_BASE = VLLM_BASE != "" ? VLLM_BASE : null }
  tags     = ["${REGISTRY}open-synthesis-worker-vllm:${VERSION}"]
}

# Tests run inside the images; the report comes out. They run every time: a cached "passed" would hide a flaky test.
target "test" {
  name = "test-${item.image}"
  matrix = {
    item = [
      { image = "client", stage = "test" },
      { image = "client-full", stage = "test-full" },
      { image = "worker", stage = "test" },
      { image = "ablate", stage = "test" },
      { image = "ops", stage = "test" },
    ]
  }
  inherits = [item.image]
  # Nothing is tested on a GPU here, so the CPU build of torch will do: gigabytes less to pull, and this machine's kind.
  platforms = []
  args = {
    TORCH_BASE   = TORCH_BASE != "" ? TORCH_BASE : "cpu-torch"
    FLASH_KERNEL = item.image == "worker" ? "" : null
  }
  # The tree as .dockerignore lets it through: an allow-list, so .env stays out here too.
  contexts        = { root = "." }
  target          = "${item.stage}-report"
  no-cache-filter = [item.stage]
  tags            = []
  output          = ["type=local,dest=build/test/${item.image}"]
}

target "lint" {
  inherits        = ["ops"]
  contexts        = { root = "." }
  target          = "lint"
  no-cache-filter = ["lint"]
  tags            = []
  output          = ["type=cacheonly"]
}

# `lock` writes the locks into the tree, `lock-check` fails where they are behind; both are one stage of the ops image.
target "lock" {
  inherits        = ["ops"]
  contexts        = { images = "images" }
  target          = "lock-update"
  no-cache-filter = ["lock"]
  tags            = []
  output          = ["type=local,dest=images"]
}

target "lock-check" {
  inherits        = ["lock"]
  target          = "lock-check"
  no-cache-filter = ["lock-check"]
  output          = ["type=cacheonly"]
}
