# What is built, from what, under which name. `make build|test|lint|lock|lock-check` are these targets.
# Needs buildx 0.13 or newer. Nothing enters a build but images/<image> and the contexts named here, so .env never can.

# Set both to push: REGISTRY=docker.io/you/ VERSION=1.2.3
variable "REGISTRY" { default = "" }
variable "VERSION" { default = "local" }
# The base images; empty keeps the defaults of the Dockerfiles, pinned by digest.
variable "PYTHON_BASE" { default = "" }
variable "TORCH_BASE" { default = "" }
# The torch that is installed where no TORCH_BASE brings one.
variable "TORCH_VERSION" { default = "2.13.0" }
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
  target = item.stage
  tags   = ["${REGISTRY}open-synthesis-${item.image}:${VERSION}"]
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
  args = { TORCH_BASE = TORCH_BASE != "" ? TORCH_BASE : "cpu-torch" }
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
