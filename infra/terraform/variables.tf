variable "project" {
  description = "Project that everything belongs to."
  type        = string
}

variable "region" {
  description = "Where the buckets are; the workers should be there too, since moving 33 GB of weights is not free."
  type        = string
  default     = "europe-west4"
}

variable "name" {
  description = "Begins the name of every bucket and account."
  type        = string
  default     = "scail"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,18}[a-z0-9]$", var.name))
    error_message = "Expected 4 to 20 lower-case letters, digits and hyphens, the first a letter."
  }
}

variable "keep_runs_days" {
  description = "How long runs/, attempts/ and cancelled/ are kept; clips/ and done/ are kept for ever."
  type        = number
  default     = 180

  validation {
    condition     = var.keep_runs_days >= 7
    error_message = "A run that is resumed reads the records of the one before: expected at least 7 days."
  }
}

variable "keep_inbox_days" {
  description = "How long manifests that were rendered or refused are kept."
  type        = number
  default     = 365
}

variable "producers" {
  description = "Who may upload manifests and see clips, such as \"group:production@studio.example\"."
  type        = list(string)
  default     = []
}

variable "kubernetes_namespace" {
  description = "Namespace of infra/k8s, whose service accounts may act as the ones made here. Empty: no GKE."
  type        = string
  default     = "scail"
}
