terraform {
  required_version = ">= 1.7"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.20"
    }
  }

  # State holds no secret of ours, but it does say what there is: keep it in a bucket of its own.
  #   terraform init -backend-config="bucket=PROJECT-terraform" -backend-config="prefix=scail"
  backend "gcs" {}
}

provider "google" {
  project = var.project
  region  = var.region
}
