"""Arguments that commands refuse, each with the exit status and words of the message."""

Row = tuple[str, str, int, str]  # module, arguments as a shell has them, exit status, words of the message
# In arguments: {here} is an empty folder, {text} a file of someone else's, {fifo} and {loop} are what they say and end
# with .csv, {null} is a null character, {link} a link to {text}, {long} a name that no file system takes. {points} is
# the folder of a run of points with snapshots for post-hoc EMA, {digits} of one of digits, both of two steps.
NUMBERS = {"--optim.lr": "optim.lr", "--loss.w": "w", "--times.gap-mu": "gap", "--model.mlp-ratio": "mlp"}
TRAIN: list[Row] = [
    *(
        ("tvm_ref.train", f"digits --run.out {{here}}/run {option} {value}", 2, word)
        for option, word in NUMBERS.items()
        for value in ("inf", "nan", "x", "''", "1e999")
    ),
    *(
        ("tvm_ref.train", f"digits --run.out {{here}}/run {words}", 2, "")
        for words in (
            "--run.steps 0", "--run.steps -1", "--run.batch 0", "--run.seed -1", "--run.device tpu", "--unknown 1",
            "--run.steps 1.5", "--run.steps", "--optim.betas 0.9", "--optim.betas 0.9,2", "--run.precision float4",
            "--run.save-every 0", "--model.heads 0", "--model.heads 7", "extra",
        )
    ),
    ("tvm_ref.train", "cifar --run.out {here}/run", 2, "cifar"),
    ("tvm_ref.train", "toy2d --run.out {text}", 2, "text.csv"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.resume {here}/none", 1, "none"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.init {here}/none", 1, "none"),
    ("tvm_ref.train", "imagenet256-w2 --run.out {here}/run --data.path {here}/none.zip", 1, "none.zip"),
]  # fmt: skip
SWEEP: list[Row] = [
    *(
        ("bench.sweep", f"--out {{here}}/a.csv {option} {value}", 2, option)
        for option in ("--seq", "--batch", "--heads", "--kv-heads", "--head-dim")
        for value in ("0", "-1", "x", "1.5", "''", "1,,2")
    ),
    *(
        ("bench.sweep", f"--out {{here}}/a.csv {option} {value}", 2, "finite number of seconds")
        for option in ("--budget-s", "--cell-limit-s", "--compile-s")
        for value in ("nan", "inf", "-1", "0", "x")
    ),
    ("bench.sweep", "--dtype float8 --out {here}/a.csv", 2, "float8"),
    ("bench.sweep", "--peer tvm={here} --out {here}/a.csv", 2, "tvm"),
    ("bench.sweep", "--peer official={here}/none --out {here}/a.csv", 2, "no folder"),
    ("bench.sweep", "--device cuda:9999 --out {here}/a.csv", 2, "cuda:9999"),
]
SEEDS: list[Row] = [
    (module, f"{words} --seed {value}", 2, "whole number from 0 to 4294967295")
    for module, words in (
        ("verify.run.command", ""),
        ("verify.model.command", ""),
        ("verify.faults.command", ""),
        ("verify.model.published", "--peer {here}"),
    )
    for value in ("-1", "x", "1.5", "4294967296", "''", "nan")
]
# What writes a CSV, with the arguments that it needs for that.
WRITERS = (
    ("verify.run.command", "--device cpu"),
    ("verify.model.command", "--device cpu"),
    ("verify.faults.command", ""),
    ("verify.codegen.command", ""),
    ("bench.train_quality", "digits"),
    ("bench.train_step", "--preset digits"),
)
OUTPUTS: list[Row] = [
    (module, f"{words} --out {path}", 2, said)
    for module, words in WRITERS
    for path, said in (
        ("{here}/a.jpg", "ends with"), ("README.md", "ends with"), ("{text}", "not written by this command"),
        ("pyproject.toml/a.csv", ""), ("{fifo}", "not written by this command"), ("{link}", "not written by"),
        ("{loop}", ""), ("/proc/none/a.csv", "--out: expected a path that can"), ("''", "got nothing"),
        ("'a{null}.csv'", "null"), ("{long}.csv", "can be written to"), ("/dev/full", ""),
    )
]  # fmt: skip
OUTPUTS += [
    (module, f"{option} /proc/none/a{ending}", 2, f"{option}: expected a path that can be written to")
    for module, option, ending in (
        ("bench.tune", "--out", ".py"), ("bench.tune", "--log", ".csv"), ("bench.train_step", "--profile", ".csv"),
        ("bench.sweep", "--out", ".csv"),
    )
]  # fmt: skip
# The same of commands whose option has no CSV.
OUTPUTS += [
    (module, f"{words} {path.replace('ENDING', ending)}", 2, said)
    for module, words, ending in (
        ("tvm_ref.sample", "{here} --out", ".png"), ("tvm_ref.sample", "{here} --out", ".zip"),
        ("tvm_ref.evaluate", "{here} --out", ".json"), ("tvm_ref.encode", "{here} --vae {here} --out", ".zip"),
        ("tvm_ref.ema", "{here} --sigma-rel 0.1 --out", ".safetensors"), ("tvm_ref.convert", "{text}", ".safetensors"),
        ("tvm_ref.export", "{here} --out", ""), ("tvm_ref.train", "toy2d --run.out", ""),
    )
    for path, said in (
        ("pyproject.toml/aENDING", "can be written to"), ("/proc/none/aENDING", "can be written to"),
        ("{long}ENDING", "can be written to"), ("/dev/full/aENDING", "can be written to"),
    )
]  # fmt: skip
TUNE: list[Row] = [
    *(("bench.tune", f"--budget-s {value}", 2, "finite number of seconds") for value in ("nan", "inf", "-1", "0", "x")),
    *(("bench.tune", f"--head-dim {value}", 2, "whole number from 1 to 256") for value in ("0", "257", "x", "64,")),
    ("bench.tune", "--out {here}/tiles.csv", 2, "ends with .py"),
    ("bench.tune", "--arch sm_30", 2, "sm_30"),
    ("bench.tune", "--log {here}/a.csv --out setup.py --compile-only", 2, "not written by this command"),
]
SAMPLES: list[Row] = [
    (f"tvm_ref.{module}", f"{{here}} {option}", status, said)
    for module in ("sample", "evaluate")
    for option, status, said in (
        ("--w inf", 2, "w: expected"), ("--w nan", 2, "w: expected"), ("--seed -1", 2, "seed: expected"),
        ("--device tpu", 2, "device: expected"), ("--nfe x", 2, "--nfe"), ("--out {here}/a.jpg", 2, "ends with"),
        ("--unknown 1", 2, "--unknown"), ("--weights best", 2, "best"), ("", 1, "no checkpoint"), ("--w x", 2, "--w"),
        ("--device cuda:9999", 2, "cuda:9999"), ("--seed 1e3", 2, "--seed"), ("--nfe ''", 2, "--nfe"),
        ("extra", 2, "extra"),
    )
]  # fmt: skip
# Files that are no checkpoint, no weights and no images.
FILES: list[Row] = [
    (f"tvm_ref.{module}", words.replace("FILE", path), 2 if path == "''" else 1, "")
    for module, words in (
        ("sample", "FILE --out {here}/a.png"), ("evaluate", "FILE"), ("convert", "FILE {here}/w.safetensors"),
        ("encode", "FILE --vae {here} --out {here}/a.zip"),
    )
    for path in ("{here}/none", "{text}", "{fifo}", "{loop}", "/dev/null", "{long}", "'{here}/ä ö \u202e'", "''")
]  # fmt: skip
OTHERS: list[Row] = [
    ("tvm_ref.ema", "{here} --sigma-rel 0.1 --out {here}/a.safetensors", 1, "no snapshots in"),
    ("tvm_ref.ema", "{here} --sigma-rel 0.5", 2, "sigma_rel"), ("tvm_ref.ema", "{here} --sigma-rel x", 2, "sigma"),
    ("tvm_ref.ema", "{here} --sigma-rel 0.1 --out {here}/a.pt", 2, "ends with"),
    ("tvm_ref.train", "digits --run.out {here}/run --config {text}", 2, "expected settings by name"),
    ("tvm_ref.train", "digits --run.out {here}/run --config {here}/no.yaml", 2, "No such file"),
    ("tvm_ref.train", "digits --run.out {here}/run --run.profile 3,2", 2, "run.profile"),
    ("tvm_ref.train", "digits --run.out {here}/run --run.loss-bins -1", 2, "run.loss_bins"),
    ("tvm_ref.train", "digits --run.out {here}/run --ema.sigma-rels 0.1,0.05", 2, "ema.sigma_rels"),
    ("verify.run.command", "--device tpu", 2, "cuda:0"), ("verify.run.command", "--backend a,b", 2, "'a' is not one"),
    ("verify.run.command", "--device cpu --case nothing", 2, "nothing"), ("verify.run.command", "--case ''", 2, ""),
    ("verify.run.command", "--device cuda:9999", 2, "cuda:9999"), ("verify.run.command", "--dtype ''", 2, "''"),
    ("verify.run.command", "extra", 2, "extra"), ("verify.model.command", "--case nothing --device cpu", 2, "nothing"),
    ("verify.codegen.command", "--arch sm_90,sm_30", 2, "'sm_30'"), ("verify.faults.command", "--only x", 2, "'x'"),
    ("verify.codegen.command", "--arch ''", 2, "''"), ("verify.faults.command", "--only ''", 2, "''"),
    ("verify.model.published", "--peer {here}", 2, "checkout"), ("bench.__main__", "sweeep", 2, "expected a command"),
    ("verify.model.published", "--peer {text}", 2, "checkout"), ("verify.model.published", "", 2, "--peer"),
    ("bench.__main__", "''", 2, "expected a command"), ("bench.train_step", "--batch 0", 2, "--batch"),
    ("bench.train_step", "--steps 0", 2, "--steps"), ("bench.host", "--out {here}/a.csv --shape 1,2", 2, "four sizes"),
    ("bench.train_step", "--preset none", 2, "none"), ("bench.train_step", "--parallel tp", 2, "'tp'"),
    ("bench.train_quality", "cifar", 2, "'cifar'"), ("bench.train_quality", "--out {here}/a.csv", 2, "a folder"),
    ("bench.host", "--out {here}/a.csv", 2, "CUDA GPU"), ("bench.interleaved", "--out {here}/a.csv", 2, "CUDA GPU"),
    ("tvm_ref.encode", "{here} --vae {here} --out {here}/a.zip", 1, "holds no image"),
    ("tvm_ref.encode", "{here} --vae {here} --out {here}/a.png", 2, "ends with"), ("tvm_ref.encode", "", 2, ""),
    ("reports.build", "--chek", 2, "--chek"), ("reports.api", "extra", 2, "extra"),
    ("flashjvp.__main__", "--unknown", 2, "--unknown"), ("flashjvp.diagnosis.command", "a", 2, "two names"),
    ("flashjvp.diagnosis.command", "no_module:model", 2, "no_module"), ("flashjvp.diagnosis.command", "''", 2, "names"),
    ("flashjvp.diagnosis.command", "os:getcwd", 2, "os:getcwd"), ("flashjvp.diagnosis.command", "sys:exit", 2, "exit"),
    ("flashjvp.diagnosis.command", "os:path", 2, "expected a function"), ("flashjvp.diagnosis.command", "a:b:c", 2, ""),
    *(("flashjvp.diagnosis.command", f"os:getcwd --json {path}", 2, "--json")
      for path in ("{here}/a.csv", "{here}/no/a.json", "{here}", "''", "'a{null}.json'", "/proc/a.json")),
]  # fmt: skip
EXPORTS: list[Row] = [
    ("tvm_ref.export", f"{{here}} {words}", status, said)
    for words, status, said in (
        ("--out {here}/new", 1, "no checkpoint"), ("--out {here}/a.json", 2, "name of a folder"), ("", 2, "--out"),
        ("--out {here}/new --layout x", 2, "layout"), ("--out {text}", 2, "exists already"),
    )
]  # fmt: skip
# A second value for an option, or twice one in a list, of which one would be silently ignored.
TWICE: list[Row] = [
    *((module, f"{words} {option} {values[0]} {option}={values[-1]}", 2, f"{option}: given twice")
      for module, words, option, *values in (
          ("verify.run.command", "", "--backend", "tiled", "triton"), ("verify.run.command", "", "--seed", "0"),
          ("verify.run.command", "", "--dtype", "float32", "float64"), ("verify.faults.command", "", "--seed", "1"),
          ("verify.run.command", "", "--out", "{here}/a.csv"), ("verify.codegen.command", "", "--arch", "sm_90"),
          ("verify.model.published", "--peer {here}", "--seed", "1"), ("bench.sweep", "", "--seq", "64", "128"),
          ("bench.sweep", "", "--providers", "math", "flashjvp"), ("bench.sweep", "", "--modes", "fwd"),
          ("bench.tune", "", "--head-dim", "64", "128"), ("bench.tune", "", "--family", "forward"),
          ("bench.train_step", "", "--parallel", "ddp", "fsdp"), ("bench.train_quality", "", "--out", "{here}/a.csv"),
          ("bench.ring", "", "--gpus", "2", "4"), ("bench.host", "", "--out", "{here}/a.csv"),
          ("tvm_ref.sample", "{here}", "--classes", "1", "2"), ("tvm_ref.evaluate", "{here}", "--nfe", "1", "2"),
          ("tvm_ref.encode", "{here} --vae {here}", "--out", "{here}/a.zip"),
          ("tvm_ref.export", "a", "--out", "{here}/b"),
          ("tvm_ref.convert", "a.pkl {here}/b.safetensors", "--settings", "digits", "toy2d"),
          ("tvm_ref.ema", "{here}", "--sigma-rel", "0.1", "0.2"), ("tvm_ref.train", "digits", "--run.steps", "1", "2"),
          ("tvm_ref.train", "digits", "--run.log-norms", "1", "2"), ("tvm_ref.train", "", "--optim.betas", "0.9,0.9"),
      )),
    ("tvm_ref.train", "digits --run.evaluate --run.no-evaluate", 2, "--run.evaluate: given twice"),
    ("tvm_ref.train", "digits --run.save_every 1 --run.save-every 2", 2, "--run.save-every: given twice"),
    ("flashjvp.diagnosis.command", "os:getcwd --json {here}/a.json --json {here}/b.json", 2, "--json: given twice"),
    ("bench.sweep", "--peer official={here} --peer official={here}", 2, "official was given twice"),
    ("bench.sweep", "--seq 64,64", 2, "64 twice"), ("verify.run.command", "--backend tiled,tiled", 2, "'tiled' twice"),
    ("bench.train_quality", "digits,digits", 2, "'digits' twice"),
    ("verify.codegen.command", "--arch sm_90,sm_90", 2, "'sm_90' twice"),
    ("tvm_ref.evaluate", "{here} --nfe 1,2,1", 2, "nfe: expected each number once"),
]  # fmt: skip
# Numbers that no work can have, in place of an overflow or a long wait.
HUGE = 10**20
LARGE: list[Row] = [
    *(("tvm_ref.train", f"toy2d --run.out {{here}}/run --{option} {HUGE}", 2, f"{option.replace('-', '_')}: exp")
      for option in ("run.steps", "run.batch", "run.threads", "run.loss-bins", "run.save-every", "run.log-norms",
                     "run.evaluate-samples", "optim.warmup-steps", "ema.every")),
    ("tvm_ref.train", f"toy2d --run.out {{here}}/run --model.depth {HUGE}", 2, "depth: expected at most 1000"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --model.mlp-ratio 1e300", 2, "mlp_ratio: expected"),
    ("tvm_ref.sample", f"{{here}} --nfe {HUGE}", 2, "nfe: expected"), ("tvm_ref.sample", "{here} --nfe 0", 2, "nfe: "),
    ("tvm_ref.sample", f"{{here}} --per-class {HUGE}", 2, "per_class: expected"),
    ("tvm_ref.evaluate", f"{{here}} --nfe 1,{HUGE}", 2, "nfe: expected"),
    ("tvm_ref.evaluate", f"{{here}} --samples {HUGE}", 2, "samples: expected"),
    ("tvm_ref.evaluate", f"{{here}} --batch {HUGE}", 2, "batch: expected"),
    *(("tvm_ref.encode", f"{{here}} --vae {{here}} --out {{here}}/a.zip --{words}", 2, words.split()[0])
      for words in ("size 12", "size 0", f"size {HUGE}", "batch 0", f"batch {HUGE}")),
    ("bench.sweep", f"--seq {HUGE} --out {{here}}/a.csv", 2, "at most"), ("bench.ring", f"--gpus {HUGE}", 2, "at most"),
    ("bench.train_step", f"--batch {HUGE}", 2, "at most"),
]  # fmt: skip
EMPTY: list[Row] = [
    *((module, words, 2, "got nothing")
      for module, words in (
          ("tvm_ref.sample", "''"), ("tvm_ref.sample", "{here} --out ''"), ("tvm_ref.sample", "{here} --out="),
          ("tvm_ref.evaluate", "{here} --out ' '"), ("tvm_ref.encode", "'' --vae '' --out ''"),
          ("tvm_ref.convert", "{text} ''"), ("tvm_ref.ema", "'' --sigma-rel 0.1"),
          ("tvm_ref.export", "{here} --out ''"),
          ("verify.run.command", "--out ' '"), ("bench.tune", "--log ''"), ("bench.host", "--out ''"),
      )),
    ("tvm_ref.train", "''", 2, "''"), ("tvm_ref.train", "digits ''", 2, "''"),
    ("tvm_ref.train", "--config ''", 2, "one YAML file"), ("tvm_ref.train", "--config {here}", 2, "regular file"),
]  # fmt: skip
ODD: list[Row] = [
    ("tvm_ref.convert", "{text} {here}/a.txt", 2, "weights: expected a file that ends with .safetensors"),
    ("tvm_ref.convert", "{text} {here}/none/a.safetensors", 1, "text.csv"),
    ("tvm_ref.train", "toy2d --loss.w-random 1 --run.out {here}/run", 2, "expected {None}|{FLOAT FLOAT}, got ['1']"),
    ("tvm_ref.train", "toy2d --data.name archive --run.out {here}/run", 2, "error: data 'archive' needs a path"),
    ("tvm_ref.train", "toy2d --run.out {loop}", 2, "can be written to"),
    ("tvm_ref.train", "toy2d --run.out /proc/run", 2, "can be written to"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --model.image-size 7", 2, "shape (2, 1, 1)"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.resume {text}", 1, "manifest.json cannot be read"),
    ("tvm_ref.train", "digits --run.out {here}/run --run.context-parallel 2", 2, "a divisor of the 1 processes"),
    ("tvm_ref.train", "digits --run.out {here}/run --data.path {text} --data.name archive", 2, "run.evaluate"),
    ("tvm_ref.train", "digits --run.no-evaluate --run.out {here}/a --data.name archive --data.path {here}", 2, "outs"),
    ("tvm_ref.export", "{here} --out .", 2, "name of a folder"), ("tvm_ref.export", "{here} --out ..", 2, "exists"),
    ("verify.model.published", "--peer {loop}", 2, "checkout"), ("verify.run.command", "--device cpu:0", 2, "'cpu:0'"),
    ("verify.run.command", "--backend tiled,", 2, "''"), ("bench.sweep", "--heads 3 --kv-heads 2", 2, "multiple of"),
    ("bench.sweep", "--peer official=", 2, "NAME=PATH"), ("bench.sweep", "--preset dit --seq 17", 2, "no shape"),
    ("bench.train_step", "--preset toy2d --batch 3 --accumulate 2 --device cpu", 2, "a multiple of 2"),
    ("flashjvp.diagnosis.command", ".:x", 2, "cannot be imported"), ("reports.api", "''", 2, "unrecognized"),
    ("flashjvp.diagnosis.command", "os.path.:x", 2, "cannot be imported"),
]  # fmt: skip
EXPERIMENTS: list[Row] = [
    ("tvm_ref.experiments.__main__", words, status, said)
    for words, status, said in (
        ("", 2, "NAME"), ("none", 2, "'none'"), ("times,none", 2, "'none'"), ("''", 2, "''"),
        ("times extra", 2, "extra"),
        ("times --scale tiny", 2, "tiny"), ("times --out {text}", 2, "expected a folder"),
        ("times --out ''", 2, "nothing"),
        ("times --out 'a{null}'", 2, "null"), ("times --out {text}/a", 2, "can be written to"),
        ("times --out /proc/none", 2, "can be written to"), ("times --out {long}", 2, "File name too long"),
        ("times --device tpu", 2, "cuda:0"), ("times --device cuda:9999 --out {here}/a", 2, "cuda:9999"),
        ("objectives --scale full --device cpu --data.path {here}/no --out {here}/a", 1, "dataset-fashion-mnist"),
        ("times --out {here}/a --imagenet-classifier {text}", 2, "--imagenet-classifier: "),
        ("times --out {here}/a --imagenet-classifier {here}", 2, "expected a regular file"),
        ("times --out {here}/a --imagenet-classifier {here}/none", 2, "No such file"),
        ("times --out {here}/a --imagenet-classifier 'a{null}'", 2, "null"),
    )
]  # fmt: skip
# Settings that are valid, but not for the run that they are given with.
RUNS: list[Row] = [
    *(("tvm_ref.sample", f"{run} --out {{here}}/{out} {words}", 2, said)
      for run, out, words, said in (
          ("{points}", "a.png", "--classes 0", "classes: the network was trained without"),
          ("{digits}", "a.png", "--classes 10", "classes: expected"),
          ("{digits}", "a.png", "--classes 1,-1", "classes: exp"),
          ("{digits}", "a.png", "--classes 1,1", "classes: expected each number once"),
          ("{digits}", "a.png", "--vae {here}", "vae: the network was not trained on latents"),
          ("{points}", "a.zip", "", "out: expected a file .png"), ("{points}", "a.png", "--w 2", "takes no guidance"),
          ("{digits}", "a.png", "--nfe 1.0", "--nfe: expected a whole number, got '1.0' ("),
          ("{digits}", "a.png", "--w 1,2", "got ['1,2']"),
      )),
    *(("tvm_ref.evaluate", f"{run} {words}", 2, said)
      for run, words, said in (
          ("{points}", "--samples 1000000000", "samples: expected from 4 to 20000"),
          ("{digits}", "--samples 3", "samples: exp"), ("{points}", "--w 2", "takes no guidance"),
          ("{digits}", "--inception {here}", "inception: only"),
          ("{digits}", "--out {digits}/config.yaml/a.json", "out: "),
          ("{digits}", "--save-images {here}/a.png", "save_images: expected"), ("{digits}", "--data x", "data: only"),
          ("{digits}", "--out {digits}/checkpoints/step-00000002/manifest.json", "not written by"),
      )),
    ("tvm_ref.ema", "{points} --sigma-rel 0.1 --step 7 --out {here}/a.safetensors", 2, "step: expected one of 1, 2, g"),
    ("tvm_ref.ema", "{points} --sigma-rel 1e-300 --out {here}/a.safetensors", 2, "from 1e-06 to less than"),
    ("tvm_ref.ema", "{points} --sigma-rel 0.1 --out {points}/ema/step-00000002-0.1.safetensors", 2, "not written by"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --ema.sigma-rels 1e-300,0.1", 2, "ema.sigma_rels: expected"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.evaluate-every 1 --run.evaluate-samples 20001", 2,
     "run.evaluate_samples: expected from 4 to 20000"),
    ("tvm_ref.train", "digits --run.out {here}/run --loss.w-random 1,1e300 --loss.w-uniform balanced", 2, "1e+06"),
    ("tvm_ref.train", "digits --run.out {here}/run --loss.w 1e-320", 2, "w: expected guidance from 1e-06"),
    ("tvm_ref.train", "toy2d --run.out {here}/run --run.vae {here}", 2, "run.vae: expected none"),
    ("tvm_ref.train", "toy2d --run.out '{here}/\udcff'", 2, "run.out: expected text in UTF-8"),
    ("tvm_ref.convert", "{text} {here}/a.safetensors --settings none", 1, "settings: expected a config.json or one of"),
    ("tvm_ref.export", "{digits} --out {digits}/config.yaml/a", 2, "out: expected a path"),
    ("bench.measure_card", "--out {here}/card", 2, "error: torch finds no CUDA GPU"),
]  # fmt: skip
ROWS = [
    *RUNS, *LARGE, *EMPTY, *ODD, *TWICE, *EXPERIMENTS, *EXPORTS, *TRAIN, *SWEEP, *SEEDS, *OUTPUTS, *TUNE, *SAMPLES,
    *FILES, *OTHERS,
]  # fmt: skip
