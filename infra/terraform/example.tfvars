project   = "studio-renders"
region    = "europe-west4"
producers = ["group:production@studio.example"]
