"""Align a multimodal language model, and measure hallucination before and after.

python train.py                    the shipped tiny LLaVA: a control, then BDHS pairs and DPO
python train.py --method rloo      another method of the study on the same model
python train.py --model DIR --data FILE --images DIR --out DIR
"""

import sys

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.evaluation.results import results_text
from minialign.methods.registry import METHODS
from minialign.models.split import split_models
from minialign.report.chosen_reliance import write_reliance
from minialign.report.page import REPORT_FILE, write_report
from minialign.training.input_files import digest_inputs
from minialign.training.inputs import build_examples, load_and_validate, load_model
from minialign.training.memory_plan_text import print_plan
from minialign.training.messages import describe_change, print_reward_model_first
from minialign.training.options import parse_options, reward_model_options
from minialign.training.reward_run import train_reward_model
from minialign.training.run import export_model, num_steps, train_variant
from minialign.training.run_folder import RunFolder
from minialign.utils.cli import run_script
from minialign.utils.distributed import init_distributed, is_main_process
from minialign.utils.messages import print_message


def main():
    """Align a model as the command line says, and measure it before and after."""
    options = parse_options(sys.argv[1:])
    init_distributed(options.device)
    if options.plan:
        print_plan(options)
        return
    split_models(options.split)
    with RunFolder.open(options) as run:
        align(options, run)


def align(options, run):
    """Align a model, and measure it before and after. The results go to the folder of the run."""
    # 1. A run that is finished has nothing left to do but its page.
    if run.is_finished():
        print_message(f"{run.path} is finished already")
        if not (run.path / REPORT_FILE).exists():  # it was stopped just before its page
            print_report(run)
        return

    # 2. Load the model and the data. Bad input is refused here, before any work.
    with run.timer("load"):
        vlm, records, evaluation_sets = load_and_validate(options)
        run.start(vlm, digest_inputs(options, records, evaluation_sets))
    print_message(
        f"model {options.model}, template {vlm.template}, {len(records)} records, "
        f"results in {run.path}",
    )
    if options.method == "reward":
        make_reward_model(options, vlm, records, run)
        return

    # 3. Measure the model before it is aligned.
    run.evaluate("base", vlm, evaluation_sets)

    # 4. RLOO, PPO and GRPO need a reward model. Train one if the user has none.
    needs_reward_model = METHODS[options.method].needs_reward_model() and not options.reward
    if needs_reward_model and not run.has_reward_model():
        make_first_reward_model(options, vlm, records, run)

    # 5. The examples to learn from. By default they are pairs, whose rejected responses BDHS
    #    samples here, from the model as it was loaded.
    with run.timer("sample"):
        examples = build_examples(options, vlm, records, run.path)

    # 6. A control learns from the same chosen responses. It drops the rejected ones.
    if options.control and options.method != "sft":
        train_variant(options, vlm, "sft", examples, run=run, folder=run.path / "control")
        run.evaluate("control", vlm, evaluation_sets)
        vlm = load_model(options, vlm.feature_cache)  # the weights from before the training

    # 7. Align the model, and measure it again.
    policy = train_variant(options, vlm, options.method, examples, run=run, folder=run.path)
    run.evaluate("aligned", vlm, evaluation_sets)
    with run.timer("evaluate"):
        write_reliance(run.path, vlm)

    # 8. Report.
    run.write_evaluation()
    if evaluation_sets:
        print(results_text(run.scores), end="\n\n")
    print(describe_change(run.scores, options.method, run.path))
    export_model(options, policy, vlm, run.path)
    run.finish(steps=num_steps(options, len(examples)), pairs=len(examples))
    print_report(run)


def make_first_reward_model(options, vlm, records, run):
    """Train the reward model that the method of this run needs."""
    reward_options = reward_model_options(options)
    print_reward_model_first(reward_options.steps, run.path / "reward")
    train_reward_model(
        reward_options,
        load_model(options, vlm.feature_cache),
        records,
        run=run,
        folder=run.path / "reward",
    )


def make_reward_model(options, vlm, records, run):
    """Train a reward model as a result of its own, for later runs of rloo, ppo or grpo."""
    policy, num_pairs = train_reward_model(options, vlm, records, run=run, folder=run.path)
    print(
        f"the reward model is in {run.path}: give it to --method rloo, ppo or grpo with --reward, "
        f"or to an annotator as reward:{run.path}"
    )
    export_model(options, policy, vlm, run.path)
    run.finish(steps=num_steps(options, num_pairs), pairs=num_pairs)
    print_report(run)


def print_report(run):
    """Write report.html, which shows all of it, and say where it is."""
    if not is_main_process():  # the others may come here before it has written all that is shown
        return
    print(f"open {write_report([run.path])} in a browser to see what happened")


if __name__ == "__main__":
    sys.exit(run_script(main))
