# Three buckets, since three kinds of people write: producers (inputs, inbox), renders (clips), operators (weights).

locals {
  bucket_prefix = "${var.project}-${var.name}"
}

resource "google_storage_bucket" "inputs" {
  name                        = "${local.bucket_prefix}-inputs"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }

  # Only what was moved out of the inbox ages; references, poses and manifests stay.
  lifecycle_rule {
    condition {
      age            = var.keep_inbox_days
      matches_prefix = ["done/", "refused/", "claims/"]
    }
    action {
      type = "Delete"
    }
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = 30
    }
    action {
      type = "Delete"
    }
  }
}

resource "google_storage_bucket" "renders" {
  name                        = "${local.bucket_prefix}-renders"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  # A clip that is overwritten by a mistaken manifest can be had back for a month.
  versioning {
    enabled = true
  }

  lifecycle_rule {
    condition {
      age            = var.keep_runs_days
      matches_prefix = ["renders/runs/", "renders/attempts/", "renders/cancelled/"]
    }
    action {
      type = "Delete"
    }
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = 30
    }
    action {
      type = "Delete"
    }
  }

  # An upload that was broken off; whoever publishes starts anew.
  lifecycle_rule {
    condition {
      age = 7
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }
}

resource "google_storage_bucket" "checkpoints" {
  name                        = "${local.bucket_prefix}-checkpoints"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }
}
