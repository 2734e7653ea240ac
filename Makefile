# Open Synthesis: every command a person runs. `make` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

# 1: a verb that found something (exit code 3 or 4) fails. Pipelines set it.
STRICT ?=

# Free text reaches programs through the environment, byte for byte: $(value …) keeps make from expanding a dollar in it.
define byte_for_byte
ifdef $(1)
override $(1) := $$(value $(1))
export $(1)
endif
endef
$(foreach name,Q DOMAIN FROM MODEL ABLATED REPO RUN DATA,$(eval $(call byte_for_byte,$(name))))

# Missing variables are found before anything is built. $(call need,VERB,VARIABLE,EXAMPLE)
need = $(if $(filter $(1),$(MAKECMDGOALS)),$(if $(strip $(value $(2))),,$(error $(1) needs $(2). Try: $(3))))
$(call need,synth,Q,make synth Q="Does ego depletion replicate?" DOMAIN=psychology)
$(call need,synth,DOMAIN,make synth Q="Does ego depletion replicate?" DOMAIN=psychology)
$(call need,retrieve,Q,make retrieve Q="Does ego depletion replicate?" DOMAIN=psychology)
$(call need,retrieve,DOMAIN,make retrieve Q="Does ego depletion replicate?" DOMAIN=psychology)
$(call need,check,RUN,make check RUN=runs/20261101T120000Z-my-question-0123abcd)
$(call need,ingest,DOMAIN,make ingest DOMAIN=my-field FROM=records.jsonl)
$(call need,ingest,FROM,make ingest DOMAIN=my-field FROM=records.jsonl)
$(call need,ablate,MODEL,make ablate MODEL=Qwen/Qwen3-14B)
$(call need,preflight,MODEL,make preflight MODEL=Qwen/Qwen3-14B)
$(call need,verify,MODEL,make verify MODEL=Qwen/Qwen3-14B ABLATED=you/Qwen3-14B-ablated)
$(call need,verify,ABLATED,make verify MODEL=Qwen/Qwen3-14B ABLATED=you/Qwen3-14B-ablated)

# $(call ran,COMMAND): run a verb's program. make itself can only answer 0 or 2, so 3 (flagged), 4 (not checked) and 10
# (changes pending) count as done unless STRICT=1; on any other code the last line says the code.
ran = code=0; $(1) || code=$$?; \
  case "$$code:$(filter-out 0,$(STRICT))" in 0:*|3:|4:|10:) ;; *) echo "$@: exit code $$code" >&2; exit $$code ;; esac
# $(call do,COMMAND): the same, with the variables of .env.
do = $(call ran,scripts/with-env $(1))

.PHONY: help ablate preflight verify push plan deploy status rollback destroy synth retrieve check check-eval ingest up down doctor \
  estimate costs pods reap build test lint lock lock-check bench

##@ 1 Ablate
ablate: ## Ablate a model, verify it, publish it privately: MODEL=Qwen/Qwen3-14B [REPO=you/name] [PUBLISH=0]
	@$(call do,scripts/run ablate -- python -m ablate)
preflight: ## Say what ablating a model needs and what is here; downloads no weights: MODEL=Qwen/Qwen3-14B
	@$(call do,scripts/run ablate -- python -m ablate --preflight)
verify: ## Measure an ablated model against its base: MODEL=Qwen/Qwen3-14B ABLATED=you/name or a folder
	@$(call do,scripts/run ablate -- python -m ablate --verify)

##@ 2 Deploy
push: ## Build and push the worker's image, note its digest: REGISTRY=docker.io/you/ [VERSION=1] [WHAT=worker] [ATTEST=0]
	@$(call do,scripts/push)
plan: ## Show how RunPod's endpoint differs from config/endpoint.yaml: [ON=local] [AS=json|markdown] [UNVERIFIED=1]
	@$(call do,scripts/ops python -m endpoint plan)
deploy: ## Make it so, prove it with a job, roll back if it fails: [ON=local] [UNVERIFIED=1]
	@$(call do,scripts/ops python -m endpoint deploy)
status: ## Workers, queue, releases, drift, cost per hour, last proof: [ON=local] [AS=json]
	@$(call do,scripts/ops python -m endpoint status)
rollback: ## Put the release before the newest one back: [ON=local]
	@$(call do,scripts/ops python -m endpoint rollback)
destroy: ## Delete the endpoint: NAME=open-synthesis [ON=local]
	@$(call do,scripts/ops python -m endpoint destroy)

##@ 3 Synthesise
synth: ## Answer a question, cited and checked: Q="…" DOMAIN=psychology [AS=json] [VERIFIER=] [JUDGE=1]
	@$(call do,scripts/synth)
retrieve: ## Show the sources of a question, send nothing: Q="…" DOMAIN=psychology
	@$(call do,scripts/run client -- python -m retrieve)
check: ## Check an old run again, from its folder alone: RUN=runs/… [VERIFIER=] [AS=json]
	@$(call do,scripts/run client -- python -m check)
check-eval: ## Measure what the checks notice, on labelled pairs; writes docs/checks-power.md: [DATA=pairs.jsonl] [VERIFIER=]
	@$(call do,scripts/run client -- python -m check_eval)
ingest: ## Load records into a domain: DOMAIN=my-field FROM=records.jsonl
	@$(call do,scripts/run client -- python -m ingest)

##@ Operate
up: ## Start the local RunPod and its worker (synth does it by itself)
	@$(call do,scripts/up)
down: ## End them: no process, no container is left
	@$(call do,scripts/down)
doctor: ## One screen: what works here, what does not, and what mends it [AS=json]
	@$(call ran,scripts/doctor)
estimate: ## What ablating and serving a model costs: [MODEL=Qwen/Qwen3-14B] [DOMAINS=4] [SYNTHESES=10] [AS=json]
	@$(call do,scripts/ops python -m costs estimate)
costs: ## What runs really took and cost, against the estimate: [MONTH=2026-11] [AS=json]
	@$(call do,scripts/ops python -m costs costs)
pods: ## List this project's pods on RunPod [ON=local] [AS=json]
	@$(call do,scripts/ops python -m pods list)
reap: ## Delete those whose deadline has passed, and see that they are gone [ON=local] [AS=json]
	@$(call do,scripts/ops python -m pods reap)

##@ Develop
build: ## Build the images (docker) or the environments (venv) that synth needs
	@$(call do,scripts/build)
test: ## Run all tests, inside the images
	@$(call do,scripts/test)
lint: ## ruff, mypy, shellcheck, hadolint, actionlint, zizmor, schemas
	@$(call do,scripts/develop lint)
lock: ## Write each image's lock from its pyproject.toml
	@$(call do,scripts/develop lock)
lock-check: ## Fail where a lock is behind its pyproject.toml
	@$(call do,scripts/develop lock-check)
bench: ## Measure start-up, ingest and image sizes against their yardsticks, side by side
	@$(call do,scripts/bench)
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## "; print "make VERB [VARIABLE=value …] [RUNTIME=auto|docker|venv] [STRICT=1]" } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
