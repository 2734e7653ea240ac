"""Stage 2: a RunPod serverless endpoint as code: plan, deploy, status, rollback, destroy."""
